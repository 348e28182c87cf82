"""A loader that keeps what is heard of its images in a store, shard by shard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.errors import StoreError
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.forward.observed import Change, Listener, Observed, Recorder, observed
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.storage.keys import Key, keys_like
from fusenorm_openood.storage.shards import ShardSet
from fusenorm_openood.storage.stored import (
    Batches,
    intact,
    row_batches,
    say_damaged,
    shard_batches,
    wait_for_shards,
)
from fusenorm_openood.storage.torchrun import this_process

SHARD = 1000  # images
Columns = dict[str, NDArray[Any]]


class _Work(NamedTuple):
    """What computes shards."""

    net: nn.Module
    listener: Listener
    progress: bool
    desc: str


@dataclass(frozen=True)
class RecordedLoader(Recorder):
    """Batches of a data set whose images are heard at most once per listener.

    What is heard of `SHARD` images is one file of a store. Shards that exist are read; the others
    are dealt out by number among the processes of `torchrun`, and every process reads all of them.

    Attributes:
        dataset: images with labels, in OpenOOD's format.
        store: folder of the store.
        record: what the scores depend on besides the listener: the network's weights, the images
            and how they are read, in terms of JSON.
        name: a name of the images, for people.
        batch_size, num_workers: settings of the data loader.
        pace: counts the images that are heard.
        start: shards of other loaders that are dealt out before; see `dealt_out`.
    """

    dataset: Dataset[Any]
    store: Path
    record: Mapping[str, Any]
    name: str
    batch_size: int = 200
    num_workers: int = 0
    pace: Pace = field(default_factory=Pace, compare=False)
    start: int = 0

    def __iter__(self) -> Iterator[Any]:
        return self._load(row_batches(range(len(self)), self.batch_size))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def first(self) -> Tensor:
        """The first two images `[2, 3, H, W]`, or the only one."""
        return torch.stack([self.dataset[number]["data"] for number in range(min(2, len(self)))])

    def observed(
        self, net: nn.Module, listener: Listener, progress: bool, desc: str
    ) -> Iterator[Observed]:
        """What a listener hears of the images, shard by shard.

        Raises:
            StoreError: the store cannot be written.
            DataError: an image cannot be read.
            NetworkError: the network fails on images.
        """
        work = self._work(net, listener, progress, desc)
        begun, _ = self._shards(listener)
        self._write(begun, self._share(begun.missing()), work)
        wait_for_shards(  # of which another process may find others
            lambda: self._shards(listener)[0].missing(),
            lambda: self._write(self._own(listener), self._own(listener).missing(), work),
        )
        complete, taken = self._shards(listener)
        for number in range(complete.count):
            if taken is not None:
                try:
                    yield taken(_observed(complete.read(number)))
                    continue
                except StoreError as error:  # what is missing there is not what is heard here
                    say_damaged(error)
                    complete, taken = self._own(listener), None
                    self._write(complete, [n for n in complete.missing() if n >= number], work)
            compute = partial(self._write, complete, [number], work)
            yield _observed(intact(complete, number, compute, bool(self._share([number]))))

    def prepare(self, net: nn.Module, listener: Listener, progress: bool) -> None:
        """Hear and keep the images of this process's shards, as far as they are missing.

        Raises:
            StoreError, DataError, NetworkError: as in `observed`.
        """
        shards, _ = self._shards(listener)
        work = self._work(net, listener, progress, self.name)
        self._write(shards, self._share(shards.missing()), work)

    def _share(self, numbers: Iterable[int]) -> list[int]:
        """Those of some shards that are this process's."""
        mine = this_process().share(self.start + number for number in numbers)
        return [number - self.start for number in mine]

    def _work(self, net: nn.Module, listener: Listener, progress: bool, desc: str) -> _Work:
        return _Work(net, listener, progress and this_process().leads, desc)

    def _shards(self, listener: Listener) -> tuple[ShardSet, Change | None]:
        """The shards of a pass, or else the complete ones of a pass that contains its answers."""
        key = self._key(listener)
        if not (self.store / key.folder_name).is_dir() or self._own(listener).missing():
            for found in keys_like(self.store, key, but="heard"):
                taken = listener.taken(found.record["heard"])
                if taken and not (other := self._of(found)).missing():
                    return other, taken
        return self._own(listener), None

    def _key(self, listener: Listener) -> Key:
        record = {**self.record, "heard": listener.what}
        if listener.what.get("mixes"):  # the images of a batch influence each other
            record["batch_size"] = self.batch_size
        return Key(record, self.name, len(self), SHARD)

    def _own(self, listener: Listener) -> ShardSet:
        return self._of(self._key(listener))

    def _of(self, key: Key) -> ShardSet:
        return ShardSet(self.store, key.record, key.name, key.rows, key.shard_rows)

    def _write(self, shards: ShardSet, numbers: Sequence[int], work: _Work) -> None:
        """Compute shards, and write each as soon as it is complete."""
        total = sum(len(shards.span(number)) for number in numbers)
        hidden = not work.progress or not numbers
        with tqdm(total=total, desc=work.desc, unit=" images", disable=hidden, leave=False) as bar:
            for number, batches in shard_batches(shards, numbers, self._load, self.batch_size):
                heard = []
                timed = self.pace.timed(batches)
                for batch in observed(work.net, timed, work.listener._replace(restore=None)):
                    heard.append(batch._replace(images=None))
                    self.pace.images += len(batch.pred)
                    bar.update(len(batch.pred))
                shards.write(number, _columns(heard))

    def _load(self, batches: Batches) -> Iterator[Any]:
        """Batches of images, given by their numbers."""
        pinned = torch.cuda.is_available()
        return iter(
            CpuLoader(
                self.dataset,
                batch_sampler=batches,
                num_workers=self.num_workers,
                pin_memory=pinned,
            )
        )


def dealt_out(loaders: Iterable[Any]) -> list[Any]:
    """The loaders; the shards of recorded ones are dealt out to processes as if all were one set.

    Short sets would otherwise leave most of many processes without work.
    """
    start, dealt = 0, []
    for loader in loaders:
        if isinstance(loader, RecordedLoader):
            loader = replace(loader, start=start)
            start += -(-len(loader) // SHARD)
        dealt.append(loader)
    return dealt


def _columns(heard: list[Observed]) -> Columns:
    """What was heard of the images of a shard, as columns."""

    def joined(tensors: list[Tensor]) -> NDArray[Any]:
        whole = torch.cat([tensor.detach().cpu() for tensor in tensors])
        array: NDArray[Any] = (whole if whole.dtype == torch.float64 else whole.float()).numpy()
        return array

    columns = {
        "pred": torch.cat([batch.pred.cpu() for batch in heard]).numpy().astype(np.int64),
        "label": np.concatenate([batch.label for batch in heard]).astype(np.int64),
        "scores": joined([batch.rows.T for batch in heard]),
    }
    seen = [batch.seen for batch in heard if batch.seen is not None]
    if seen:
        columns |= {name: joined([getattr(s, name) for s in seen]) for name in Seen._fields}
    return {name: array for name, array in columns.items() if array.size}


def _observed(columns: Columns) -> Observed:
    """What `_columns` was made of."""
    count = len(columns["pred"])
    rows = columns.get("scores", np.empty((count, 0), np.float32))
    seen = None
    if not {"feature", "logits"}.isdisjoint(columns):
        none = np.empty((count, 0), np.float32)
        seen = Seen(*(torch.from_numpy(columns.get(name, none)) for name in Seen._fields))
    pred = torch.from_numpy(columns["pred"])
    return Observed(torch.from_numpy(np.ascontiguousarray(rows.T)), pred, columns["label"], seen)
