"""A loader that keeps what is heard of its images in a store, shard by shard."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.listening.observed import Listener, Observed, observed
from fusenorm_openood.listening.pace import Pace
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.store import Key, ShardSet
from fusenorm_openood.store.loading import shard_batches
from fusenorm_openood.torchrun import Process, this_process, wait_until

SHARD = 1000  # images
Columns = dict[str, NDArray[Any]]


class _Work(NamedTuple):
    """What computes shards."""

    net: nn.Module
    listener: Listener
    progress: bool
    desc: str


@dataclass(frozen=True)
class RecordedLoader:
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
    """

    dataset: Dataset[Any]
    store: Path
    record: Mapping[str, Any]
    name: str
    batch_size: int = 200
    num_workers: int = 0
    pace: Pace = field(default_factory=Pace, compare=False)

    def __iter__(self) -> Iterator[Any]:
        size = self.batch_size
        every = range(len(self))
        return self._load([list(every[at : at + size]) for at in range(0, len(self), size)])

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
        shards, process = self._shards(listener.what), this_process()
        work = _Work(net, listener, progress and process.leads, desc)
        self._write(shards, process.share(shards.missing()), work)
        wait_until(lambda: not shards.missing())
        for number in range(shards.count):
            yield _observed(self._read(shards, number, process, work))

    def _shards(self, what: Mapping[str, Any]) -> ShardSet:
        """The shards of a pass, or if these exist, of the same pass with features."""

        def shards(what: Mapping[str, Any]) -> tuple[dict[str, Any], str, int, int]:
            return {**self.record, "heard": what}, self.name, len(self), SHARD

        if what.get("features") is False:
            richer = shards({**what, "features": True})
            if (self.store / Key(*richer).folder_name).is_dir():
                found = ShardSet(self.store, *richer)
                if not found.missing():
                    return found
        return ShardSet(self.store, *shards(what))

    def _read(self, shards: ShardSet, number: int, process: Process, work: "_Work") -> Columns:
        """A shard; a damaged one is computed again by the process whose share it is."""
        try:
            return shards.read(number)
        except DamagedShardError as error:
            if not process.share([number]):
                wait_until(lambda: _is_intact(shards, number))
                return shards.read(number)
            tqdm.write(f"fusenorm: {error}: it is computed again", file=sys.stderr)
            damaged = shards.present()[number]
            self._write(shards, [number], work)
            if shards.present()[number] == damaged and not _is_intact(shards, number):
                damaged.unlink(missing_ok=True)
            return shards.read(number)

    def _write(self, shards: ShardSet, numbers: list[int], work: "_Work") -> None:
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

    def _load(self, batches: list[list[int]]) -> Iterator[Any]:
        """Batches of images, given by their numbers."""
        pinned = torch.cuda.is_available()
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=batches,
                num_workers=self.num_workers,
                pin_memory=pinned,
            )
        )


def _is_intact(shards: ShardSet, number: int) -> bool:
    try:
        shards.read(number)
    except StoreError:
        return False
    return True


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
