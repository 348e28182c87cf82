"""Judge image files one by one, or shard by shard into a store."""

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import packed
from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.method.conformal import rejects
from fusenorm_openood.network.fingerprint import identify
from fusenorm_openood.storage.files import manifest
from fusenorm_openood.storage.shards import Columns, Key, ShardSet
from fusenorm_openood.storage.stored import Batches, StoredScores, forward_digest, shard_batches
from fusenorm_openood.storage.torchrun import this_process
from fusenorm_openood.storage.urls import Place
from fusenorm_openood.version import __version__

SHARD = 1000  # images


class Judged(NamedTuple):
    """The row of one image file; all but `path` and `error` are None if it is unreadable.

    Attributes:
        path: the file.
        predicted: the predicted class, by name if the detector knows names.
        confidence: larger = more in-distribution.
        p_value: conformal p-value, None without calibration images.
        ood: the verdict, None without calibration images.
        objected: the expert that lowered the confidence most; see `Explanation`.
        error: why the file could not be judged.
    """

    path: str
    predicted: str | None = None
    confidence: float | None = None
    p_value: float | None = None
    ood: bool | None = None
    objected: str | None = None
    error: str | None = None


class ImageFiles(Dataset[Any]):
    """Tensors `[3, H, W]` of image files, or a string: why a file cannot be read."""

    def __init__(self, paths: Sequence[Place], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.preprocessing.read(self.paths[number])
        except DataError as error:
            # Stores hold no bytes that are not UTF-8, as in some names.
            return str(error).encode("utf-8", "backslashreplace").decode()


class ReadableFiles(ImageFiles):
    """Image files without labels, `{"data": [3, H, W], "label": -1}`; DataError if unreadable."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"data": self.preprocessing.read(self.paths[number]), "label": -1}


def judge_files(
    detector: FuseNorm,
    paths: Sequence[Place],
    acceptance: float = 0.95,
    batch_size: int = 64,
    num_workers: int = 0,
    pace: Pace | None = None,
) -> Iterator[list[Judged]]:
    """The rows of image files, in order, batch by batch.

    Args:
        detector: a fitted detector with its preprocessing; without calibration images it gives
            confidences alone.
        paths: image files.
        acceptance: fraction of ID images to accept; see `FuseNorm.is_ood`.
        batch_size, num_workers: settings of the data loader.
        pace: counts the images that are scored.

    Raises:
        DataError: the detector has no preprocessing.
    """
    pace, first = pace or Pace(), 0
    files = ImageFiles(paths, detector.known_preprocessing())
    loader = CpuLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    for batch in pace.timed(loader):
        pace.images += len(batch)
        yield judged(
            detector, paths[first : first + len(batch)], score(detector, batch), acceptance
        )
        first += len(batch)


def score(detector: FuseNorm, batch: Sequence[Tensor | str]) -> Columns:
    """What a store has of `B` items of `ImageFiles`.

    Returns:
        `scores` of the experts `[B, L]`, NaN for images that cannot be scored; `pred`, the
        predicted classes `[B]`, -1 for these; `error`, why they cannot be scored `[B]`, else empty.
    """
    scores = np.full((len(batch), len(detector.experts)), np.nan)
    pred = np.full(len(batch), -1, np.int64)
    error = np.array([item if isinstance(item, str) else "" for item in batch], dtype=object)

    def fill(rows: Sequence[int]) -> None:
        images = torch.stack([batch[row] for row in rows])  # type: ignore[misc]
        experts, pred[rows] = detector.expert_scores(images)
        scores[rows] = experts.T

    rows = [row for row, item in enumerate(batch) if isinstance(item, Tensor)]
    try:
        if rows:
            fill(rows)
    except NonFiniteError:  # find the images that it is about
        for row in rows:
            try:
                fill([row])
            except NonFiniteError as failure:
                error[row] = str(failure)
    return {"scores": scores, "pred": pred, "error": error}


def judged(
    detector: FuseNorm, paths: Sequence[Place], columns: Columns, acceptance: float
) -> list[Judged]:
    """The rows of files with these columns; see `score`."""
    fine = columns["error"] == ""
    why = detector.explain_scores(columns["scores"][fine].T, columns["pred"][fine])
    names, p = detector.class_names, why.p_values
    ood = None if p is None else rejects(p, acceptance)
    rows = []
    for path, error, i in zip(paths, columns["error"], np.cumsum(fine) - 1, strict=True):
        if error:
            rows.append(Judged(str(path), error=error))
            continue
        predicted = str(why.pred[i]) if names is None else names[why.pred[i]]
        verdict: tuple[float | None, bool | None] = (None, None)
        if p is not None and ood is not None:
            verdict = float(p[i]), bool(ood[i])
        rows.append(Judged(str(path), predicted, float(why.conf[i]), *verdict, why.objected[i]))
    return rows


class FileShards:
    """Image files whose expert scores are in a store.

    Each shard is `SHARD` files, scored whole by one process, whichever that is.

    Args:
        detector, paths, batch_size, num_workers, pace: see `judge_files`.
        store: folder or URL of the store.

    Raises:
        DataError: the detector has no preprocessing.
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
        if (structure := detector.known_structure) and structure.batch_dependent:
            record["batch_size"] = batch_size  # the images of a batch influence each other
        self.stored = StoredScores(
            store, Key(record, "files", len(paths), SHARD), self._compute, shared=False
        )

    @property
    def shards(self) -> ShardSet:
        return self.stored.shards

    def judged(
        self, acceptance: float, written: Iterator[int] | None = None
    ) -> Iterator[list[Judged]]:
        """Score this process's share of the missing shards, then judge all, in order.

        A process that does not lead judges none. A damaged shard is scored again.

        Args:
            acceptance: see `judge_files`.
            written: the missing shards, in the order in which others write them; None = none do.
        """
        if written is None and not this_process().leads:
            self.stored.compute_share()
            return
        stored = iter(self.stored) if written is None else self.stored.after(written)
        for number, columns in enumerate(stored):
            span = self.shards.span(number)
            for at in np.flatnonzero(columns["error"] != ""):  # unreadable, perhaps for a moment
                for name, value in score(self.detector, [self._files[span[at]]]).items():
                    columns[name][[at]] = value
            yield judged(self.detector, self.paths_of(number), columns, acceptance)

    def paths_of(self, number: int) -> Sequence[Place]:
        """The files of a shard."""
        span = self.shards.span(number)
        return self.paths[span.start : span.stop]

    def _compute(self, numbers: Sequence[int]) -> Iterator[Columns]:
        for _, batches in shard_batches(self.shards, numbers, self._load, self.batch_size):
            yield scored(self.detector, batches, self.pace)

    def _load(self, batches: Batches) -> Iterator[Any]:
        return iter(
            CpuLoader(
                self._files, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list
            )
        )


def scored(
    detector: FuseNorm, batches: Iterable[Sequence[Tensor | str]], pace: Pace | None = None
) -> Columns:
    """The columns of a shard, from the items of `ImageFiles`; `pace` counts the images."""
    parts, pace = [], pace or Pace()
    for batch in pace.timed(batches):
        parts.append(score(detector, batch))
        pace.images += len(batch)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
        "output": detector.settings.score("output").to_json(),
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
