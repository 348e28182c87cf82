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
from fusenorm_openood.detectors.calibration import packed
from fusenorm_openood.detectors.fusenorm import FuseNorm
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


class Judged(NamedTuple):
    """What is said of one image file; all but `path` and `error` are None if it is unreadable.

    Attributes:
        path: the file.
        predicted: the predicted class, by name if the detector knows names.
        confidence: larger = more in-distribution.
        p_value: conformal p-value, None without calibration images.
        ood: the verdict, None without calibration images.
        objected: the expert that objected most; see `Explanation`.
        error: why the file could not be judged.
    """

    path: str
    predicted: str | None = None
    confidence: float | None = None
    p_value: float | None = None
    ood: bool | None = None
    objected: str | None = None
    error: str | None = None


class ImageFiles(Dataset[tuple[int, Tensor | str]]):
    """Tensors `[3, H, W]` of image files, or why a file cannot be read, with their numbers."""

    def __init__(self, paths: Sequence[Place], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, self.preprocessing.read(self.paths[number])
        except DataError as error:
            # Of a name that is not UTF-8, stores keep no byte.
            return number, str(error).encode("utf-8", "backslashreplace").decode()


class ReadableFiles(Dataset[dict[str, Any]]):
    """Image files that all have to be readable, without labels: `{"data": [3, H, W], "label": -1}`.

    Raises:
        DataError: on access to an image, a file that cannot be read.
    """

    def __init__(self, paths: Sequence[Place], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

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
    """The judgements of image files, in order, batch by batch.

    Args:
        detector: a fitted detector that knows its preprocessing; without calibration images it
            gives confidences alone.
        paths: image files.
        acceptance: share of ID images to accept; see `DecidingDetector.is_ood`.
        batch_size, num_workers: settings of the data loader.
        pace: counts the images that are scored.

    Raises:
        DataError: the detector does not know its preprocessing.
    """
    pace = pace or Pace()
    files = ImageFiles(paths, detector.known_preprocessing())
    loader = CpuLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    for batch in pace.timed(loader):
        pace.images += len(batch)
        names = [str(paths[number]) for number, _ in batch]
        yield judged(detector, names, score_batch(detector, batch), acceptance)


class FileScores(NamedTuple):
    """What the experts say of `B` image files.

    Attributes:
        experts: their scores `[L, B]`, NaN for files that could not be scored.
        pred: predicted classes `[B]`, -1 for such files.
        error: why a file could not be scored `[B]`, empty if it was.
    """

    experts: NDArray[np.float64]
    pred: NDArray[np.int64]
    error: NDArray[Any]


def score_batch(detector: FuseNorm, batch: Sequence[tuple[int, Tensor | str]]) -> FileScores:
    """The scores of the items of `ImageFiles`; an image with non-finite scores has an error."""
    scores = FileScores(
        np.full((len(detector.experts), len(batch)), np.nan),
        np.full(len(batch), -1, np.int64),
        np.array([item if isinstance(item, str) else "" for _, item in batch], dtype=object),
    )
    images = [(at, item) for at, (_, item) in enumerate(batch) if isinstance(item, Tensor)]
    if not images:
        return scores
    places = [at for at, _ in images]
    try:
        found = detector.expert_scores(torch.stack([image for _, image in images]))
        scores.experts[:, places], scores.pred[places] = found
    except NonFiniteError:
        for at, image in images:
            try:
                scores.experts[:, [at]], scores.pred[[at]] = detector.expert_scores(image[None])
            except NonFiniteError as error:
                scores.error[at] = str(error)
    return scores


def judged(
    detector: FuseNorm, paths: Sequence[str], scores: FileScores, acceptance: float
) -> list[Judged]:
    """What a detector says of files with these scores."""
    fine = scores.error == ""
    why = detector.explain_scores(scores.experts[:, fine], scores.pred[fine])
    names, p_values = detector.class_names, why.p_values
    said: list[dict[str, Any]] = [
        {
            "predicted": str(c) if names is None else names[c],
            "confidence": float(conf),
            "objected": expert,
        }
        for c, conf, expert in zip(why.pred, why.conf, why.objected, strict=True)
    ]
    if p_values is not None:
        for one, p, ood in zip(said, p_values, rejects(p_values, acceptance), strict=True):
            one |= {"p_value": float(p), "ood": bool(ood)}
    about = iter(said)
    return [
        Judged(path, **next(about)) if not error else Judged(path, error=error)
        for path, error in zip(paths, scores.error, strict=True)
    ]


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
        if (structure := detector.known_structure) and structure.batch_dependent:
            record["batch_size"] = batch_size  # the images of a batch influence each other
        self.stored = StoredScores(
            store, Key(record, "files", len(paths), SHARD), self._compute, shared=False
        )

    @property
    def shards(self) -> ShardSet:
        return self.stored.shards

    def judged(self, acceptance: float) -> Iterator[list[Judged]]:
        """Score this process's share of the missing shards, then judge all, in order.

        A process that does not lead judges none. A damaged shard is scored again.
        """
        if this_process().leads:
            yield from self._judged(iter(self.stored), acceptance)
        else:
            self.stored.compute_share()

    def judged_after(self, written: Iterator[int], acceptance: float) -> Iterator[list[Judged]]:
        """Judge all shards, in order, while others write the missing ones.

        Args:
            written: the missing shards, in the order in which they are written.
            acceptance: see `judge_files`.
        """
        return self._judged(self.stored.after(written), acceptance)

    def paths_of(self, number: int) -> Sequence[Place]:
        """The files of a shard."""
        span = self.shards.span(number)
        return self.paths[span.start : span.stop]

    def _judged(self, stored: Iterable[Columns], acceptance: float) -> Iterator[list[Judged]]:
        for number, columns in enumerate(stored):
            span = self.shards.span(number)
            names = [str(path) for path in self.paths_of(number)]
            experts = np.ascontiguousarray(columns["scores"].T)
            scores = FileScores(experts, columns["pred"], columns["error"])
            for at in np.flatnonzero(scores.error != ""):  # unreadable, perhaps for a moment
                again = score_batch(self.detector, [self._files[span[at]]])
                for values, value in zip(scores, again, strict=True):
                    values[..., [at]] = value
            yield judged(self.detector, names, scores, acceptance)

    def _compute(self, numbers: Sequence[int]) -> Iterator[Columns]:
        for _, batches in shard_batches(self.shards, numbers, self._load, self.batch_size):
            yield scored(self.detector, batches, self.pace)

    def _load(self, batches: Batches) -> Iterator[Any]:
        loader = CpuLoader(
            self._files, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list
        )
        return iter(loader)


def scored(
    detector: FuseNorm,
    batches: Iterable[Sequence[tuple[int, Tensor | str]]],
    pace: Pace | None = None,
) -> Columns:
    """The columns of a shard, from the items of `ImageFiles`; `pace` counts the images."""
    parts, pace = [], pace or Pace()
    for batch in pace.timed(batches):
        parts.append(score_batch(detector, batch))
        pace.images += len(batch)
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
