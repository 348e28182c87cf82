"""Judge image files one by one, whatever some of them are."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fusenorm_openood.data.loader import CpuLoader
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.listening.pace import Pace
from fusenorm_openood.method.conformal import rejects
from fusenorm_openood.urls import Place


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
