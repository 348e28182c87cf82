"""Judge image files one by one, whatever some of them are."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.method.conformal import rejects


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

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, self.preprocessing.read(self.paths[number])
        except DataError as error:
            return number, str(error)


class ReadableFiles(Dataset[Tensor]):
    """Tensors `[3, H, W]` of image files that all have to be readable."""

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        return self.preprocessing.read(self.paths[number])


def judge_files(
    detector: FuseNorm,
    paths: Sequence[Path],
    acceptance: float = 0.95,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Iterator[list[Judged]]:
    """The judgements of image files, in order, batch by batch.

    Args:
        detector: a fitted detector that knows its preprocessing; without calibration images it
            gives confidences alone.
        paths: image files.
        acceptance: share of ID images to accept; see `DecidingDetector.is_ood`.
        batch_size, num_workers: settings of the data loader.

    Raises:
        DataError: the detector does not know its preprocessing.
    """
    files = ImageFiles(paths, detector.known_preprocessing())
    loader = DataLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    for batch in loader:
        images = [image for _, image in batch if isinstance(image, Tensor)]
        said = iter(_judged(detector, images, acceptance))
        yield [
            Judged(str(paths[number]), **next(said))
            if isinstance(image, Tensor)
            else Judged(str(paths[number]), error=image)
            for number, image in batch
        ]


def _judged(detector: FuseNorm, images: list[Tensor], acceptance: float) -> list[dict[str, Any]]:
    if not images:
        return []
    try:
        why = detector.explain(torch.stack(images), with_maps=False)
    except NonFiniteError as error:
        if len(images) == 1:
            return [{"error": str(error)}]
        return [said for image in images for said in _judged(detector, [image], acceptance)]
    names = detector.class_names
    said: list[dict[str, Any]] = [
        {
            "predicted": str(c) if names is None else names[c],
            "confidence": float(conf),
            "objected": expert,
        }
        for c, conf, expert in zip(why.pred, why.conf, why.objected, strict=True)
    ]
    if why.p_values is not None:
        for one, p, ood in zip(said, why.p_values, rejects(why.p_values, acceptance), strict=True):
            one |= {"p_value": float(p), "ood": bool(ood)}
    return said
