"""A loader that keeps what is heard of its images in a store, shard by shard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.forward.observed import Listener, Observed, Recorder, observed
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.storage.shards import Columns, Key
from fusenorm_openood.storage.stored import (
    Batches,
    StoredScores,
    Take,
    row_batches,
    shard_batches,
)
from fusenorm_openood.storage.torchrun import this_process

SHARD = 1000  # images


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
        yield from map(_observed, self._stored(net, listener, progress, desc))

    def prepare(self, net: nn.Module, listener: Listener, progress: bool) -> None:
        """Hear and keep the images of this process's shards, as far as they are missing.

        Raises:
            StoreError, DataError, NetworkError: as in `observed`.
        """
        self._stored(net, listener, progress, self.name).compute_share()

    def _stored(
        self, net: nn.Module, listener: Listener, progress: bool, desc: str
    ) -> StoredScores:
        """What the store has of a pass over the images; the rest is heard."""
        progress = progress and this_process().leads

        def compute(numbers: Sequence[int]) -> Iterator[Columns]:
            shards = stored.shards
            total = sum(len(shards.span(number)) for number in numbers)
            hidden = not (progress and numbers)
            with tqdm(total=total, desc=desc, unit=" images", disable=hidden, leave=False) as bar:
                for _, batches in shard_batches(shards, numbers, self._load, self.batch_size):
                    heard = []
                    timed = self.pace.timed(batches)
                    for batch in observed(net, timed, listener._replace(restore=None)):
                        heard.append(batch._replace(images=None))
                        self.pace.images += len(batch.pred)
                        bar.update(len(batch.pred))
                    yield _columns(heard)

        def taken(what: Mapping[str, Any]) -> Take | None:
            change = listener.taken(what)
            return None if change is None else lambda kept: _columns([change(_observed(kept))])

        record = {**self.record, "heard": listener.what}
        if listener.what.get("mixes"):  # the images of a batch influence each other
            record["batch_size"] = self.batch_size
        key = Key(record, self.name, len(self), SHARD)
        stored = StoredScores(self.store, key, compute, start=self.start, taken=taken)
        return stored

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
