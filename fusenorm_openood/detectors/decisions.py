"""Verdicts with a known error rate: calibrate a fitted detector on new ID images, then decide."""

import os
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset
from typing_extensions import Self

from fusenorm_openood.detectors.base import Detector, Images
from fusenorm_openood.errors import CalibrationError
from fusenorm_openood.forward.observed import Observed
from fusenorm_openood.method.conformal import (
    Guarantee,
    check_enough,
    conformal_p_values,
    guarantee,
    rejects,
)
from fusenorm_openood.method.statistics import ROUNDING
from fusenorm_openood.storage.urls import Url

REPEATED = 0.1  # share of calibration images that may look like images of the fit


class DecidingDetector(Detector):
    """A detector that turns confidences into p-values and verdicts, after `calibrate`.

    Attributes:
        reference_: confidences `[n]` of the calibration images, sorted; None before `calibrate`.
    """

    reference_: NDArray[np.float64] | None = None
    _data: Any = None  # a weak reference to what it was fitted on

    def calibrate(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score ID images that neither trained the network nor fitted the detector.

        Their confidences are what p-values compare an image with. The confidences themselves do
        not change. Images that repeat each other are counted once, with a warning, because p-values
        need images that are drawn independently.

        Raises:
            NotFittedError: before `fit`.
            CalibrationError: the loader, its data set, one of its files or more than a tenth of its
                images are those of `fit`.
            DataError, NonFiniteError: as in `infer`.
        """
        self._check_fitted()
        fitted_on = self._data and self._data()
        if fitted_on is not None:
            check_apart(fitted_on, data_of(loader))
        marks: list[NDArray[np.float64]] = []

        def score(heard: Observed) -> Tensor:
            if len(self.experts) == 1:  # two images may well have one score in common
                marks.append(_marks(heard))
            return self._expert_scores(heard)

        experts, *_ = self._collect(loader, progress, "calibrate", score=score)
        conf = self.confidence(experts).astype(np.float64)
        repeated = self._repeated(experts)
        if repeated > REPEATED * len(conf):
            raise CalibrationError(
                f"{repeated} of {len(conf)} calibration images are among those that the "
                "detector is fitted on: give ID images that it has not seen"
            )
        if marks:
            experts = np.concatenate([experts, np.concatenate(marks, axis=1)])
        first = distinct_columns(experts) if len(experts) > 1 else np.arange(len(conf))
        if len(first) < len(conf):
            warnings.warn(
                f"{len(conf) - len(first)} of {len(conf)} calibration images repeat others: "
                f"p-values and the guarantee are those of the {len(first)} distinct images",
                UserWarning,
                stacklevel=2,
            )
        self.reference_ = np.sort(conf[first])
        return self

    def p_values(self, images: Images) -> Tensor:
        """Conformal p-values `[B]` of images `[B, C, H, W]`, larger = more in-distribution.

        An ID image that is exchangeable with the calibration images has a p-value of at most a
        with a probability of at most a.

        Raises:
            CalibrationError: before `calibrate`.
            NonFiniteError: NaN or infinity in the images or in their features.

        Source: Bates et al., Annals of Statistics 2023; see `conformal_p_values`.
        """
        reference = self._reference()
        conf = self.score(images)
        p = conformal_p_values(conf.cpu().numpy(), reference)
        return torch.from_numpy(np.asarray(p)).to(conf)

    def is_ood(self, images: Images, acceptance: float = 0.95) -> Tensor:
        """Verdicts `[B]`, True = OOD, that accept a share `acceptance` of ID images on average.

        Args:
            images: `[B, C, H, W]`, or one image `[C, H, W]`.
            acceptance: share of ID images to accept, in (0, 1); it may change at any time.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for it.
            ConfigError: an acceptance outside (0, 1).
        """
        check_enough(len(self._reference()), acceptance)
        p = self.p_values(images)
        rejected = rejects(p.cpu().numpy(), acceptance)
        return torch.from_numpy(np.asarray(rejected)).to(p.device)

    def guarantee(self, acceptance: float = 0.95, confidence: float = 0.95) -> Guarantee:
        """What the calibration images promise for the share of accepted ID images.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images.
            ConfigError: an acceptance or a confidence outside (0, 1).
        """
        return guarantee(len(self._reference()), acceptance, confidence)

    def _begin(self, loader: Iterable[Any]) -> Iterable[Any]:
        readings = super()._begin(loader)
        self.reference_, self._data = None, _data_of_weakly(loader)
        return readings

    def _reference(self) -> NDArray[np.float64]:
        self._check_fitted()
        if self.reference_ is None:
            raise CalibrationError(
                f"this {type(self).__name__} has no calibration images: call calibrate(loader) "
                "with ID images that it was not fitted on"
            )
        return self.reference_

    def _repeated(self, experts: NDArray[Any]) -> int:
        """How many images with these expert scores `[L, N]` were in the fit, as far as known."""
        return 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_data": None}


def repeated_columns(known: NDArray[Any], new: NDArray[Any]) -> int:
    """Number of columns of `[L, M]` that equal one of `[L, N]` up to float32 rounding."""
    from scipy.spatial import cKDTree  # takes long to import

    scale = known.std(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    distance, _ = cKDTree((known / scale).T).query((new / scale).T)
    return int(np.count_nonzero(distance < 1e-4 * np.sqrt(len(known))))


def distinct_columns(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Numbers of the first of all columns of `[L, N]` that are equal up to float32 rounding."""
    from scipy.sparse import coo_matrix  # take long to import
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    scores = scores.astype(np.float64)
    spread, largest = scores.std(axis=1), abs(scores).max(axis=1)
    rounding = 1e-4 * spread + ROUNDING * largest + np.finfo(np.float32).tiny
    columns = (scores / rounding[:, None]).T
    # Equal columns fall into few cells, so that the number of pairs stays small.
    _, first, cell = np.unique(columns.round(), axis=0, return_index=True, return_inverse=True)
    pairs = cKDTree(columns[first]).query_pairs(1.0, p=np.inf, output_type="ndarray")
    links = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(len(first), len(first)))
    group = connected_components(links, directed=False)[1][cell.reshape(-1)]
    return np.unique(group, return_index=True)[1]


def _marks(heard: Observed) -> NDArray[np.float64]:
    """Numbers `[M, B]` that tell images apart: projections of these, or of what was recorded."""
    seen = heard.images if heard.images is not None else heard.seen
    if seen is None:
        return np.empty((0, len(heard.pred)))
    parts = [seen] if isinstance(seen, Tensor) else list(seen)
    flat = torch.cat([part.detach().flatten(1).cpu().double() for part in parts], dim=1).numpy()
    marks: NDArray[np.float64] = np.random.default_rng(0).normal(size=(4, flat.shape[1])) @ flat.T
    return marks


def check_apart(fit: Any, calibration: Any) -> None:
    """Raise CalibrationError if an image is in both of two data sets or lists of files."""
    fitted = set(_items(fit))
    both = [item for item in _items(calibration) if item in fitted]
    if both:
        example = f", for example {both[0]}" if isinstance(both[0], str) else ""
        raise CalibrationError(
            f"{len(both)} calibration images are among those that the detector is fitted on"
            f"{example}: give ID images that it has not seen"
        )


def _items(data: Any) -> list[Any]:
    """What tells the images of a data set from others: their files, else their numbers in it."""
    if isinstance(data, Subset):
        items = _items(data.dataset)
        return [items[int(number)] for number in data.indices]
    files = getattr(data, "paths", data)
    if hasattr(data, "samples"):  # torchvision
        files = [sample[0] for sample in data.samples if isinstance(sample, tuple)]
    if isinstance(files, Sequence) and all(isinstance(file, str | Path | Url) for file in files):
        return [str(file if isinstance(file, Url) else os.path.realpath(file)) for file in files]
    return [(id(data), number) for number in range(len(data) if hasattr(data, "__len__") else 1)]


def data_of(loader: Iterable[Any]) -> Any:
    """The data set of a loader, or the loader if it has none."""
    dataset = getattr(loader, "dataset", None)
    return loader if dataset is None else dataset


def _data_of_weakly(loader: Iterable[Any]) -> Any:
    try:
        return weakref.ref(data_of(loader))
    except TypeError:  # a list, whose images are recognised instead
        return None
