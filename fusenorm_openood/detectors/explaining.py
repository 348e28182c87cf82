"""What confidences are made of, and where in the images."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.atf import FeatureNorm, atf_map
from fusenorm_openood.network.running import eval_mode, unwrapped

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm


@dataclass(frozen=True)
class Explanation:
    """What the confidences of `B` images are made of.

    Attributes:
        experts: names of the experts.
        conf: confidences `[B]`, larger = more in-distribution.
        pred: predicted classes `[B]`.
        scores: scores `[L, B]` of the experts, larger = more in-distribution.
        normalised: normalised scores `[L, B]`: in standard deviations from the mean of the ID
            images, those of blocks by their logarithms; or by percentiles, if the settings say so.
        weights: weights of the strong experts, which sum to 1.
        contributions: contributions `[L, B]` of the experts to the confidences, their sums.
        below_mean: by how much each contribution `[L, B]` is below its mean over the ID images.
        objected: the expert whose contribution is farthest below its mean, for each image.
        maps: by layer, heat maps `[B, H, W]` that add up to its norms; see `atf_map`.
        p_values: conformal p-values `[B]`, None without calibration images.
    """

    experts: tuple[str, ...]
    conf: NDArray[np.float64]
    pred: NDArray[np.int64]
    scores: NDArray[np.float64]
    normalised: NDArray[np.float64]
    contributions: NDArray[np.float64]
    below_mean: NDArray[np.float64]
    objected: tuple[str, ...]
    maps: dict[str, Tensor]
    weights: dict[str, float]
    p_values: NDArray[np.float64] | None = None

    @classmethod
    def of(
        cls,
        statistics: DetectorStatistics,
        scores: NDArray[np.float64],
        pred: NDArray[np.int64],
        maps: dict[str, Tensor],
    ) -> "Explanation":
        """That of images with these scores `[L, B]`, predicted classes `[B]` and heat maps."""
        contributions = statistics.contributions(scores)
        below = statistics.mean_contributions - contributions
        return cls(
            statistics.experts,
            statistics.confidence(scores),
            pred,
            scores,
            statistics.normalised(scores),
            contributions,
            below,
            tuple(statistics.experts[row] for row in below.argmax(axis=0)),
            maps,
            statistics.weights,
        )


def heat_maps(detector: "FuseNorm", images: Tensor) -> dict[str, Tensor]:
    """By layer, heat maps `[B, H, W]` of images `[B, C, H, W]`, from one more pass."""
    on_device, norm = moved(detector.net, images), detector.settings.feature_norm
    structure, run = detector.structure(on_device), partial(_heat_map, norm=norm)
    with eval_mode(unwrapped(detector.net)), torch.no_grad():
        return forward_pass(detector.net, on_device, structure, detector.taps, run).maps


def _heat_map(feature_map: Tensor, norm: FeatureNorm) -> Tensor:
    return atf_map(feature_map, *norm).cpu()
