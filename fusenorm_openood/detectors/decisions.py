"""Verdicts with a known error rate: calibrate a fitted detector on new ID images, then decide."""

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from fusenorm_openood.detectors.base import Detector, Images
from fusenorm_openood.errors import CalibrationError
from fusenorm_openood.method.conformal import (
    Guarantee,
    check_enough,
    conformal_p_values,
    guarantee,
    rejects,
)

REPEATED = 0.1  # share of calibration images that may look like images of the fit


class DecidingDetector(Detector):
    """A detector that turns confidences into p-values and verdicts, after `calibrate`.

    Attributes:
        reference_: confidences `[n]` of the calibration images, sorted; None before `calibrate`.
    """

    reference_: NDArray[np.float64] | None = None
    _data: tuple[Any, ...] = ()  # references to what it was fitted on

    def calibrate(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score ID images that neither trained the network nor fitted the detector.

        Their confidences are what p-values compare an image with. The confidences themselves do
        not change.

        Raises:
            NotFittedError: before `fit`.
            CalibrationError: the loader, its data set or more than a tenth of its images are those
                of `fit`.
            DataError, NonFiniteError: as in `infer`.
        """
        self._check_fitted()
        if any(data() is given for data in self._data for given in _data_of(loader)):
            raise CalibrationError(
                "the calibration images are the data set that the detector was fitted on: give ID "
                "images that it has not seen"
            )
        scored = self.infer(loader, progress, "calibrate")
        repeated = self._repeated(scored.experts)
        if repeated > REPEATED * len(scored.conf):
            raise CalibrationError(
                f"{repeated} of {len(scored.conf)} calibration images are among those that the "
                "detector was fitted on: give ID images that it has not seen"
            )
        self.reference_ = np.sort(scored.conf.astype(np.float64))
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
        return {**vars(self), "_data": ()}


def repeated_columns(known: NDArray[Any], new: NDArray[Any]) -> int:
    """Number of columns of `[L, M]` that equal one of `[L, N]` up to float32 rounding."""
    from scipy.spatial import cKDTree  # takes long to import

    scale = known.std(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    distance, _ = cKDTree((known / scale).T).query((new / scale).T)
    return int(np.count_nonzero(distance < 1e-4 * np.sqrt(len(known))))


def _data_of(loader: Iterable[Any]) -> tuple[Any, ...]:
    dataset = getattr(loader, "dataset", None)
    return (loader,) if dataset is None else (loader, dataset)


def _data_of_weakly(loader: Iterable[Any]) -> tuple[Any, ...]:
    found = []
    for data in _data_of(loader):
        try:
            found.append(weakref.ref(data))
        except TypeError:  # a list, whose images are recognised instead
            continue
    return tuple(found)
