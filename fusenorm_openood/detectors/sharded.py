"""Score image files shard by shard, in any number of processes, into a store."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.data.loader import CpuLoader
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.calibration import packed
from fusenorm_openood.detectors.folder import FileScores, ImageFiles, Judged, judged, score_batch
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.listening.pace import Pace
from fusenorm_openood.store import ShardSet, forward_digest
from fusenorm_openood.store.encoding import Columns
from fusenorm_openood.store.loading import Batches, intact, shard_batches, wait_for_shards
from fusenorm_openood.structure.identity import identify
from fusenorm_openood.torchrun import Process
from fusenorm_openood.urls import Place, versions
from fusenorm_openood.version import __version__

SHARD = 1000  # images


class FileShards:
    """Image files whose expert scores are kept in a store.

    Each shard is `SHARD` files, scored whole by one process, whichever that is.

    Args:
        detector: a fitted detector that knows its preprocessing.
        paths: image files.
        store: folder or URL of the store.
        batch_size, num_workers: settings of the data loader.
        pace: counts the images that are scored.

    Raises:
        DataError: the detector does not know its preprocessing.
        StoreError: the store cannot be written.
    """

    def __init__(
        self,
        detector: FuseNorm,
        paths: Sequence[Place],
        store: Place,
        batch_size: int = 64,
        num_workers: int = 0,
        pace: Pace | None = None,
    ) -> None:
        self.detector, self.paths, self.pace = detector, paths, pace or Pace()
        self.batch_size, self.num_workers = batch_size, num_workers
        self._files = ImageFiles(paths, detector.known_preprocessing())
        record = {**experts_record(detector, store), "images": manifest(paths)}
        if (structure := detector.known_structure) and structure.mixes:
            record["batch_size"] = batch_size  # the images of a batch influence each other
        self.shards = ShardSet(store, record, "files", len(paths), SHARD)

    def score(self, numbers: Sequence[int], after: Callable[[int], object] | None = None) -> None:
        """Score shards, and write each as soon as it is complete.

        Args:
            numbers: the shards.
            after: called with the number of images of each batch.
        """

        def count(images: int) -> None:
            self.pace.images += images
            if after is not None:
                after(images)

        for number, batches in shard_batches(self.shards, numbers, self._load, self.batch_size):
            self.shards.write(number, scored(self.detector, self.pace.timed(batches), count))

    def judged(
        self, acceptance: float, process: Process, after: Callable[[int], object] | None = None
    ) -> Iterator[list[Judged]]:
        """Score this process's share of the missing shards, then judge all, in order.

        A process that does not lead judges none. A damaged shard is scored again.
        """
        mine = process.share(self.shards.missing())
        if process.world > 1:
            self.score(mine, after)
        for number in range(self.shards.count if process.leads else 0):
            if process.world > 1:
                wait_for_shards(
                    partial(self._missing, number), lambda: self.score(self.shards.missing(), after)
                )
            elif number in mine:
                self.score([number], after)
            yield self._said(number, acceptance)

    def _missing(self, last: int) -> list[int]:
        return [number for number in self.shards.missing() if number <= last]

    def judged_after(self, written: Iterator[int], acceptance: float) -> Iterator[list[Judged]]:
        """Judge all shards, in order, while others write the missing ones.

        Args:
            written: the missing shards, in the order in which they are written.
            acceptance: see `judge_files`.
        """
        missing = set(self.shards.missing())
        for number in range(self.shards.count):
            while number in missing:
                missing.discard(next(written))
            yield self._said(number, acceptance)

    def paths_of(self, number: int) -> Sequence[Place]:
        """The files of a shard."""
        span = self.shards.span(number)
        return self.paths[span.start : span.stop]

    def _said(self, number: int, acceptance: float) -> list[Judged]:
        kept = intact(self.shards, number, partial(self.score, [number]))
        span = self.shards.span(number)
        names = [str(path) for path in self.paths_of(number)]
        scores = FileScores(np.ascontiguousarray(kept["scores"].T), kept["pred"], kept["error"])
        for at in np.flatnonzero(scores.error != ""):  # perhaps it could not be read for a moment
            again = score_batch(self.detector, [self._files[span[at]]])
            for values, value in zip(scores, again, strict=True):
                values[..., [at]] = value
        return judged(self.detector, names, scores, acceptance)

    def _load(self, batches: Batches) -> Iterator[Any]:
        loader = CpuLoader(
            self._files, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list
        )
        return iter(loader)


def scored(
    detector: FuseNorm,
    batches: Iterable[Sequence[tuple[int, Tensor | str]]],
    after: Callable[[int], object] = lambda images: None,
) -> Columns:
    """The columns of a shard, from the items of `ImageFiles`; `after` as in `FileShards.score`."""
    parts = []
    for batch in batches:
        parts.append(score_batch(detector, batch))
        after(len(batch))
    experts, pred, error = zip(*parts, strict=True)
    return {
        "scores": np.ascontiguousarray(np.concatenate(experts, axis=1).T),
        "pred": np.concatenate(pred),
        "error": np.concatenate(error),
    }


def experts_record(detector: FuseNorm, store: Place) -> dict[str, Any]:
    """All that the expert scores of image files depend on besides these, in terms of JSON."""
    calibration, preprocessing = detector._check_fitted(), detector.known_preprocessing()
    tensors, record = packed(calibration)
    hashed = sha256(json.dumps([record["posthoc"], record["thresholds"]]).encode())
    for name in sorted(name for name in tensors if name.startswith("state.")):
        hashed.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return {
        **network_record(detector.net, preprocessing, store),
        "experts": detector.experts,
        "norm": detector.settings.feature_norm,
        "output": detector.settings.output_expert,
        "fitted": hashed.hexdigest(),
        "preprocessing": preprocessing.to_json(),
    }


def network_record(
    net: nn.Module, preprocessing: Preprocessing, store: Place
) -> dict[str, str | None]:
    """What a store tells a network by: its modules and weights, and what it computes."""
    found = identify(net, (3, *preprocessing.crop))
    record = {"version": __version__, "network": found.digest}
    if not found.logits:
        return {**record, "forward": None}

    def agrees(logits: NDArray[np.float64]) -> bool:
        return found.agrees(found._replace(logits=logits.tolist()))

    logits, images = np.array(found.logits, np.float64), {"image": found.image}
    return {**record, "forward": forward_digest(store, {**record, **images}, logits, agrees)}


def manifest(paths: Sequence[Place]) -> str:
    """SHA-256 of the paths, and of the versions of the files that exist."""
    hashed = sha256()
    for path, version in zip(paths, versions(paths), strict=True):
        hashed.update(f"{path} {version}".rstrip().encode("utf-8", "surrogatepass") + b"\n")
    return hashed.hexdigest()
