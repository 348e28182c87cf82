"""Why an image has its confidence: what each expert says, and where its energy sits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.detectors.calibration import Calibration
from fusenorm_openood.method.conformal import conformal_p_values


@dataclass(frozen=True)
class Explanation:
    """What the confidences of `B` images are made of.

    Attributes:
        experts: names of the experts.
        conf: confidences `[B]`, larger = more in-distribution.
        pred: predicted classes `[B]`.
        scores: scores `[L, B]` of the experts, larger = more in-distribution.
        normalised: normalised scores `[L, B]`: the 5th and 95th percentile of ID images are 0 and
            1; with the joint penalty in standard deviations from their mean.
        shares: shares `[L, B]` of the experts in the confidences, which are their sums.
        objections: by how much each share `[L, B]` is below its mean over the ID images.
        objected: the expert with the largest objection to each image.
        maps: by tap, heat maps `[B, H, W]` that add up to its norms; see `atf_map`.
        p_values: conformal p-values `[B]`, None without calibration images.
    """

    experts: tuple[str, ...]
    conf: NDArray[np.float64]
    pred: NDArray[np.int64]
    scores: NDArray[np.float64]
    normalised: NDArray[np.float64]
    shares: NDArray[np.float64]
    objections: NDArray[np.float64]
    objected: tuple[str, ...]
    maps: dict[str, Tensor]
    p_values: NDArray[np.float64] | None = None


def explanation(
    calibration: Calibration,
    scores: NDArray[Any],
    conf: NDArray[Any],
    pred: NDArray[Any],
    maps: dict[str, Tensor],
    reference: NDArray[np.float64] | None = None,
) -> Explanation:
    """The explanation of images with these expert scores `[L, B]`."""
    z, shares = calibration.normalised_and_shares(scores)
    objections = calibration.mean_shares - shares
    objected = tuple(calibration.experts[row] for row in objections.argmax(axis=0))
    p_values = None if reference is None else conformal_p_values(conf, reference)
    return Explanation(
        calibration.experts, conf, pred, scores, z, shares, objections, objected, maps, p_values
    )
