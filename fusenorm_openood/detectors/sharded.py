"""Score image files shard by shard, in any number of processes, into a store."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from fusenorm_openood.detectors.calibration import packed
from fusenorm_openood.detectors.folder import FileScores, ImageFiles, Judged, judged, score_batch
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.listening.pace import Pace
from fusenorm_openood.networks.fingerprint import fingerprint
from fusenorm_openood.store import ShardSet
from fusenorm_openood.store.loading import Batches, intact, shard_batches, wait_for_shards
from fusenorm_openood.structure.wrappers import unwrapped
from fusenorm_openood.torchrun import Process
from fusenorm_openood.version import __version__

SHARD = 1000  # images


class FileShards:
    """Image files whose expert scores are kept in a store.

    Each shard is `SHARD` files, scored whole by one process, whichever that is.

    Args:
        detector: a fitted detector that knows its preprocessing.
        paths: image files.
        store: folder of the store.
        batch_size, num_workers: settings of the data loader.
        pace: counts the images that are scored.

    Raises:
        DataError: the detector does not know its preprocessing.
        StoreError: the store cannot be written.
    """

    def __init__(
        self,
        detector: FuseNorm,
        paths: Sequence[Path],
        store: Path,
        batch_size: int = 64,
        num_workers: int = 0,
        pace: Pace | None = None,
    ) -> None:
        self.detector, self.paths, self.pace = detector, paths, pace or Pace()
        self.batch_size, self.num_workers = batch_size, num_workers
        self._files = ImageFiles(paths, detector.known_preprocessing())
        record = {**experts_record(detector), "images": manifest(paths)}
        self.shards = ShardSet(store, record, "files", len(paths), SHARD)

    def score(self, numbers: Sequence[int], after: Callable[[int], object] | None = None) -> None:
        """Score shards, and write each as soon as it is complete.

        Args:
            numbers: the shards.
            after: called with the number of images of each batch.
        """
        for number, batches in shard_batches(self.shards, numbers, self._load, self.batch_size):
            parts = []
            for batch in self.pace.timed(batches):
                parts.append(score_batch(self.detector, batch))
                self.pace.images += len(batch)
                if after is not None:
                    after(len(batch))
            experts, pred, error = zip(*parts, strict=True)
            columns = {
                "scores": np.ascontiguousarray(np.concatenate(experts, axis=1).T),
                "pred": np.concatenate(pred),
                "error": np.concatenate(error),
            }
            self.shards.write(number, columns)

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

    def _said(self, number: int, acceptance: float) -> list[Judged]:
        kept = intact(self.shards, number, partial(self.score, [number]))
        span = self.shards.span(number)
        names = [str(path) for path in self.paths[span.start : span.stop]]
        scores = FileScores(np.ascontiguousarray(kept["scores"].T), kept["pred"], kept["error"])
        for at in np.flatnonzero(scores.error != ""):  # perhaps it could not be read for a moment
            again = score_batch(self.detector, [self._files[span[at]]])
            for values, value in zip(scores, again, strict=True):
                values[..., [at]] = value
        return judged(self.detector, names, scores, acceptance)

    def _load(self, batches: Batches) -> Iterator[Any]:
        loader = DataLoader(
            self._files, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list
        )
        return iter(loader)


def experts_record(detector: FuseNorm) -> dict[str, Any]:
    """All that the expert scores of image files depend on besides these, in terms of JSON."""
    calibration, preprocessing = detector._check_fitted(), detector.known_preprocessing()
    tensors, record = packed(calibration)
    hashed = sha256(json.dumps([record["posthoc"], record["thresholds"]]).encode())
    for name in sorted(name for name in tensors if name.startswith("state.")):
        hashed.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return {
        "version": __version__,
        "network": fingerprint(unwrapped(detector.net)).weights,
        "experts": detector.experts,
        "norm": detector.settings.feature_norm,
        "output": detector.settings.output_expert,
        "fitted": hashed.hexdigest(),
        "preprocessing": preprocessing.to_json(),
    }


def manifest(paths: Sequence[Path]) -> str:
    """SHA-256 of the paths, and of the sizes and times of the files that exist."""
    hashed = sha256()
    for path in paths:
        try:
            found = path.stat()
            hashed.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
        except OSError:
            hashed.update(f"{path}\n".encode())
    return hashed.hexdigest()
