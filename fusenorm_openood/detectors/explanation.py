"""Why an image has its confidence: what each expert says, and where its energy sits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.detectors.calibration import Calibration
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.method.joint import standardised_logs
from fusenorm_openood.method.shares import joint_shares, strong_shares, weak_shares
from fusenorm_openood.method.statistics import normalise, standardise


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


def normalised_and_shares(
    scores: NDArray[Any], calibration: Calibration
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Normalised scores and shares `[L, N]` of the experts from their scores `[L, N]`."""
    c, s = calibration, calibration.settings
    strong = [c.experts.index(name) for name in c.strong]
    shares = np.zeros(scores.shape)
    if c.joint is not None:
        taps = len(c.joint.mean)
        z = np.zeros(scores.shape)
        z[:taps] = standardised_logs(scores[:taps], c.joint)
        z[strong] = standardise(scores[strong], c.statistics, s.clip)
        shares[:taps] = joint_shares(scores[:taps], c.joint, s.joint_weight)
        shares[strong] += strong_shares(z[strong], s.weights)
        return z, shares
    z = normalise(scores, c.statistics)
    weak = [row for row in range(len(c.experts)) if row not in strong]
    clipped = np.minimum(z[strong], 1) if s.clip else z[strong]
    shares[strong] = strong_shares(clipped, s.weights)
    shares[weak] = weak_shares(z[weak], s.base, s.cap)
    return z, shares


def explanation(
    calibration: Calibration,
    scores: NDArray[Any],
    conf: NDArray[Any],
    pred: NDArray[Any],
    maps: dict[str, Tensor],
    reference: NDArray[np.float64] | None = None,
) -> Explanation:
    """The explanation of images with these expert scores `[L, B]`."""
    _, usual = normalised_and_shares(calibration.id_scores, calibration)
    z, shares = normalised_and_shares(scores, calibration)
    objections = usual.mean(axis=1, keepdims=True) - shares
    objected = tuple(calibration.experts[row] for row in objections.argmax(axis=0))
    p_values = None if reference is None else conformal_p_values(conf, reference)
    return Explanation(
        calibration.experts, conf, pred, scores, z, shares, objections, objected, maps, p_values
    )
