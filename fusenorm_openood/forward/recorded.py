"""Score all images of a loader; one that is recorded keeps them in a store, shard by shard."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.batches import Throughput, batches
from fusenorm_openood.forward.experts import BatchScores, Expert, Scoring
from fusenorm_openood.forward.given import check_finite
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.scores.base import Features
from fusenorm_openood.network.running import network_errors
from fusenorm_openood.storage.shards import Columns, Key
from fusenorm_openood.storage.stored import Batches, StoredScores, Take, row_batches, shard_batches
from fusenorm_openood.storage.torchrun import this_process

SHARD = 1000  # images
# How images are scored, given a function that returns the first of them on the network's device:
# it is called if they have to show how the network is built.
ScoringOf = Callable[[Callable[[], Tensor]], Scoring]


class Scored(NamedTuple):
    """Results of a detector on `N` images."""

    conf: NDArray[Any]  # confidences `[N]`, larger = more in-distribution
    pred: NDArray[np.int64]  # predicted classes `[N]`
    label: NDArray[np.int64]  # labels `[N]` from the loader, -1 where it gives none
    experts: NDArray[Any]  # scores of the experts `[L, N]`, larger = more in-distribution


@dataclass(frozen=True)
class RecordedLoader:
    """Batches of a data set each of whose images is run through a network at most once.

    What `Scoring.run` gives for `SHARD` images is one file of a store. Shards that exist are read;
    the others are dealt out by number among the processes of `torchrun`, and every process reads
    all of them.
    """

    dataset: Dataset[Any]  # images with labels, in OpenOOD's format
    store: Path
    # What the scores depend on besides `Scoring.record`, in terms of JSON: the network's weights,
    # the images and how they are read.
    record: Mapping[str, Any]
    name: str  # of the images, for people
    batch_size: int = 200
    num_workers: int = 0
    throughput: Throughput = field(default_factory=Throughput, compare=False)
    start: int = 0  # shards of other loaders that are dealt out before; see `dealt_out`

    def __iter__(self) -> Iterator[Any]:
        return self._load(row_batches(range(len(self)), self.batch_size))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def first(self) -> Tensor:
        """The first two images `[2, 3, H, W]`, or the only one."""
        return torch.stack([self.dataset[number]["data"] for number in range(min(2, len(self)))])

    def run(self, scoring: Scoring, progress: bool, desc: str) -> Iterator[BatchScores]:
        """What `Scoring.run` gives for the images, shard by shard."""
        stored = self._stored(scoring, progress, desc)
        return map(partial(_from_columns, scoring.recorded), stored)

    def prepare(self, scoring: Scoring, progress: bool) -> None:
        """Score this process's shards, as far as they are missing."""
        self._stored(scoring, progress, self.name).compute_share()

    def _stored(self, scoring: Scoring, progress: bool, desc: str) -> StoredScores:
        progress = progress and this_process().leads

        def compute(numbers: Sequence[int]) -> Iterator[Columns]:
            total = sum(len(stored.shards.span(number)) for number in numbers)
            hidden = not (progress and numbers)
            with tqdm(total=total, desc=desc, unit=" images", disable=hidden, leave=False) as bar:
                for _, loaded in shard_batches(stored.shards, numbers, self._load, self.batch_size):
                    done = []
                    for images, labels in batches(self.throughput.timed(loaded)):
                        with network_errors(scoring.net, images):
                            batch = scoring.run(moved(scoring.net, images))
                        label = np.full(len(images), -1) if labels is None else labels
                        done.append(batch._replace(label=label))
                        self.throughput.images += len(images)
                        bar.update(len(images))
                    yield _to_columns(scoring.recorded, done)

        record = {**self.record, "content": scoring.record}
        if scoring.structure.batch_dependent:
            record["batch_size"] = self.batch_size
        key = Key(record, self.name, len(self), SHARD)
        taken = partial(_taken, json.loads(json.dumps(scoring.record)))
        stored = StoredScores(self.store, key, compute, start=self.start, taken=taken)
        return stored

    def _load(self, batches: Batches) -> Iterator[Any]:
        """Batches of images, given by their numbers."""
        how: dict[str, Any] = {"num_workers": self.num_workers, "batch_sampler": batches}
        return iter(CpuLoader(self.dataset, pin_memory=torch.cuda.is_available(), **how))


def collect(
    net: nn.Module,
    scoring_of: ScoringOf,
    loader: Iterable[Any],
    rows: Sequence[Expert],
    progress: bool,
    desc: str,
    each: Callable[[BatchScores], None] | None = None,
    may_overflow: bool = False,
) -> Scored:
    """Scores of experts, predictions and labels of a loader's images, without confidences.

    `each` is called with each batch whose scores are finite; see `check_finite`, and `batches` for
    loaders and progress bars. DataError for a loader without images, NetworkError if the network
    fails.
    """
    done: list[tuple[NDArray[Any], ...]] = []
    waiting: list[tuple[Tensor, BatchScores]] = []

    def read(matrix: Tensor, batch: BatchScores) -> None:
        experts = matrix.cpu().numpy()  # waits for the device
        check_finite(batch.images, experts, rows, may_overflow)
        if each is not None:
            each(batch)
        done.append((experts, batch.pred.cpu().numpy(), batch.label))

    for batch in _batch_scores(net, scoring_of, loader, progress, desc):
        waiting.append((batch.matrix(rows), batch))
        # A GPU scores one batch while the next one is loaded and copied to it.
        if batch.pred.device.type == "cpu" or len(waiting) > 1:
            read(*waiting.pop(0))
    for left in waiting:
        read(*left)
    if not done:
        raise DataError("loader must give at least one image, got none")
    experts, pred, label = zip(*done, strict=True)
    pred, label = (np.concatenate(arrays).astype(np.int64) for arrays in (pred, label))
    return Scored(np.empty(0), pred, label, np.concatenate(experts, axis=1))


def _batch_scores(
    net: nn.Module, scoring_of: ScoringOf, loader: Iterable[Any], progress: bool, desc: str
) -> Iterator[BatchScores]:
    if isinstance(loader, RecordedLoader):
        scoring = scoring_of(lambda: moved(net, loader.first))
        yield from map(scoring.complete, loader.run(scoring, progress, desc))
        return
    for images, labels in batches(loader, progress, desc):
        with network_errors(net, images):
            on_device = moved(net, images)
            batch = scoring_of(lambda given=on_device: given)(on_device)  # type: ignore[misc]
        label = np.full(len(images), -1) if labels is None else labels
        yield batch._replace(label=label, images=images)


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


def _to_columns(experts: Sequence[Expert], batches: Sequence[BatchScores]) -> Columns:
    """The scores of the images of a shard as columns, without empty ones."""

    def joined(tensors: Iterable[Tensor]) -> NDArray[Any]:
        whole = torch.cat([tensor.detach().cpu() for tensor in tensors])
        return (whole if whole.dtype == torch.float64 else whole.float()).numpy()

    columns = {
        "pred": torch.cat([batch.pred.cpu() for batch in batches]).numpy().astype(np.int64),
        "label": np.concatenate([batch.label for batch in batches]).astype(np.int64),
    }
    if experts:
        columns["scores"] = joined(batch.matrix(experts).T for batch in batches)
    for name in Features._fields:
        columns[name] = joined(getattr(batch.features, name) for batch in batches)
    return {name: array for name, array in columns.items() if array.size}


def _from_columns(experts: Sequence[Expert], columns: Columns) -> BatchScores:
    """What `_to_columns` was given."""
    none = np.empty((len(columns["pred"]), 0), np.float32)
    scores = torch.from_numpy(np.ascontiguousarray(columns.get("scores", none).T))
    features = Features(*(torch.from_numpy(columns.get(n, none)) for n in Features._fields))
    by_expert = dict(zip(experts, scores, strict=True))
    pred = torch.from_numpy(columns["pred"])
    return BatchScores(by_expert, pred, features, columns["label"])


def _taken(mine: Mapping[str, Any], other: Mapping[str, Any]) -> Take | None:
    """How the columns of another pass contain those of one with the record `mine`; None = not.

    Gradients make a pass split the images otherwise, which may round otherwise.
    """
    fits = (
        mine.keys() == other.keys()
        and mine["batch_dependent"] == other["batch_dependent"]
        and mine["features"] in ("", other["features"])
        and mine["feature"] == other["feature"]
        and bool(mine["scores"]) == bool(other["scores"])
        and mine["thresholds"].items() <= other["thresholds"].items()
    )
    ours, theirs = (
        [*record.get("norms", ()), *record.get("scores", ())] for record in (mine, other)
    )
    if not fits or any(expert not in theirs for expert in ours):
        return None
    rows = [theirs.index(expert) for expert in ours]

    def take(columns: Columns) -> Columns:
        found = {n: c for n, c in columns.items() if n != "feature" or mine["features"]}
        if "scores" in found:
            found["scores"] = found["scores"][:, rows]
        return {name: array for name, array in found.items() if array.size}

    return take
