"""Fuse strong and weak experts into one confidence: `Fusion`; as published, also `fuse`."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fusenorm_openood.errors import DataError
from fusenorm_openood.method.joint import JointDistance, JointStatistics, sum_of_rows
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.statistics import IDStatistics
from fusenorm_openood.method.validation import BASE, NOT_NEGATIVE, scaled_weights


def deviation(z: Tensor) -> Tensor:
    """d = max(0, -z, z - 1): the distance of a normalised score from the unit interval."""
    return torch.maximum(-z, z - 1).clamp(min=0)


def penalty(deviations: Tensor, base: float = 20.0, cap: float = 1.0) -> Tensor:
    """min(cap, base^D - 1) of the largest deviations D of weak experts.

    Args:
        deviations: of any shape, >= 0.
        base: how steeply the penalty grows, >= 1.
        cap: the largest penalty, >= 0.

    Returns:
        Penalties of that shape in [0, cap], larger = less in-distribution.
    """
    if base == 1:
        return deviations * 0
    limit = math.log1p(cap) / math.log(base)  # base^limit - 1 = cap; beyond it powers overflow
    return (deviations.clamp(max=limit) * math.log(base)).expm1().clamp(max=cap)


def fuse(
    strong: ArrayLike,
    weak: ArrayLike,
    weights: Sequence[float] | None = None,
    base: float = 20.0,
    cap: float = 1.0,
) -> NDArray[np.float64]:
    """Weighted mean of the strong experts minus the penalty of the weak ones.

    Args:
        strong: normalised scores `[S, N]` of the experts that carry the decision, S >= 1.
        weak: normalised scores `[W, N]` of the experts that can only lower it; W may be 0.
        weights: one weight >= 0 per strong expert, scaled to sum to 1; None = equal weights.
        base: see `penalty`.
        cap: see `penalty`.

    Returns:
        Confidences `[N]`, larger = more in-distribution.

    Raises:
        ConfigError: invalid weights, base or cap.
        DataError: scores that are not `[experts, N]` with the same N.

    Source: `fuse_norm` in the FuseNorm repository (equal weights, base 20, cap 1).

    Examples:
        >>> fuse([[0.5, 0.5]], [[0.5, 1.1]])  # the second one: 0.5 - (20^0.1 - 1)
        array([0.5       , 0.15071715])
    """
    strong, weak = (np.array(z, dtype=np.float64) for z in (strong, weak))
    if strong.ndim != 2 or weak.ndim != 2 or len(strong) == 0 or strong.shape[1] != weak.shape[1]:
        raise DataError(
            "strong and weak scores must be [experts, images] for the same images, with at least "
            f"one strong expert, got shapes {strong.shape} and {weak.shape}"
        )
    base, cap = BASE("base", base), NOT_NEGATIVE("cap", cap)
    scaled = torch.tensor(scaled_weights(weights, len(strong)), dtype=torch.float64, device="cpu")
    fused = sum_of_rows(scaled[:, None] * torch.from_numpy(strong))
    if len(weak):
        fused = fused - penalty(deviation(torch.from_numpy(weak)).amax(0), base, cap)
    return fused.numpy()


class Fusion(nn.Module):
    """Contributions of the experts to the confidences, which are their sums.

    Scores are `[L, N]` in float64: the feature norms of all tapped layers first, in their order,
    then the other strong experts.

    Args:
        settings: of the detector.
        strong: rows of the strong experts.
        weights: their weights, which sum to 1.
        layers: number of tapped layers.
        experts: number of experts.
        statistics: ID statistics of all experts, or with the joint penalty of the strong ones.
        joint: statistics of the joint distance, with the joint penalty or `clip`.
    """

    weights: Tensor
    is_weak: Tensor
    origin: Tensor
    scale: Tensor
    most: Tensor

    def __init__(
        self,
        settings: Settings,
        strong: Sequence[int],
        weights: Sequence[float],
        layers: int,
        experts: int,
        statistics: IDStatistics,
        joint: JointStatistics | None,
    ) -> None:
        super().__init__()
        self.settings, self.layers = settings, layers
        self.joint = None if joint is None else JointDistance(joint)
        rows, is_joint = list(strong), settings.penalty == "joint"
        self.has_weak = len(rows) < experts and not is_joint
        given, origin, scale = np.zeros(experts), np.zeros(experts), np.ones(experts)
        most, is_weak = np.full(experts, np.inf), np.ones(experts, dtype=bool)
        of = rows if is_joint else slice(None)
        origin[of], scale[of] = statistics.lower, statistics.upper - statistics.lower
        within = range(len(rows)) if is_joint else rows  # the strong experts' statistics
        if settings.normalisation == "standardised":
            origin[rows], scale[rows] = statistics.mean[within], statistics.std[within]
        if settings.clip:
            most[rows] = statistics.upper[within]
        given[rows], is_weak[rows] = weights, False
        columns = {"weights": given, "origin": origin, "scale": scale, "most": most}
        for name, column in {**columns, "is_weak": is_weak}.items():
            self.register_buffer(name, torch.tensor(column, device="cpu").unsqueeze(1))

    def forward(self, scores: Tensor) -> Tensor:
        """Contributions `[L, N]`, larger = more in-distribution."""
        s = self.settings
        z = self.normalised(scores)
        given = self.weights * z
        if s.penalty == "joint":
            terms = self.joint_distance.terms(scores[: self.layers])
            shares = terms.clamp(min=0)  # so that no layer raises the confidence
            total = sum_of_rows(shares)
            parts = torch.where(total > 0, shares / total, 1 / self.layers)
            return _added(given, -self.joint_distance.penalty(terms, s.joint_margin, s.cap) * parts)
        if self.has_weak:
            deviations = torch.where(self.is_weak, deviation(z), 0)
            given = given - _by_largest(deviations, penalty(deviations.amax(0), s.base, s.cap))
        if self.joint is None:
            return given
        terms = self.joint.terms(scores[: self.layers])
        return _added(given, -s.cap * _by_largest(terms, self.joint.far_off(terms)))

    def normalised(self, scores: Tensor) -> Tensor:
        """Normalised scores `[L, N]`: those of strong experts clipped, if `clip` is set.

        With the joint penalty, those of weak experts are their logarithms, standardised.
        """
        z = (torch.minimum(scores, self.most) - self.origin) / self.scale
        if self.settings.penalty != "joint":
            return z
        u = self.joint_distance.standardised(scores[: self.layers])
        weak = self.is_weak[: self.layers]
        return torch.cat([torch.where(weak, u, z[: self.layers]), z[self.layers :]])

    @property
    def most_of_strong(self) -> float:
        """The largest confidence there is: that of strong experts without a penalty."""
        most = self.weights * (self.most - self.origin) / self.scale
        return float(most[self.weights > 0].sum())

    @property
    def largest_penalty(self) -> float:
        """The largest penalty there is: the cap, or infinite where images may be far off."""
        return math.inf if self.joint and self.settings.cap else self.settings.cap

    def upper_bound(self, layers: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """From norms `[l, N]` of some layers to what confidences `[N]` are at most.

        The strong experts give at most `most_of_strong`. The joint distance and the largest
        deviation of some layers, and so the penalties, are at most those of all.
        """
        s, rows, most = self.settings, list(layers), self.most_of_strong
        joint = None if self.joint is None else self.joint.of_layers(rows)
        origin, scale, is_weak = (t[rows] for t in (self.origin, self.scale, self.is_weak))

        def bound(norms: Tensor) -> Tensor:
            terms = None if joint is None else joint.terms(norms)
            if joint is not None and terms is not None and s.penalty == "joint":
                return most - joint.penalty(terms, s.joint_margin, s.cap)
            deviations = torch.where(is_weak, deviation((norms - origin) / scale), 0)
            found = most - penalty(deviations.amax(0), s.base, s.cap)
            if joint is None or terms is None:
                return found
            return found - s.cap * joint.far_off(terms)

        return bound

    @property
    def joint_distance(self) -> JointDistance:
        """The joint distance, with the joint penalty."""
        assert self.joint is not None  # which the joint penalty implies
        return self.joint


def _by_largest(values: Tensor, amount: Tensor) -> Tensor:
    """Amounts `[N]` in the rows of the largest values `[L, N]`, 0 in the others: `[L, N]`."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return torch.where(rows == values.argmax(0), amount, 0)


def _added(given: Tensor, of_layers: Tensor) -> Tensor:
    """Contributions of all experts, with others of the layers added."""
    layers = len(of_layers)
    return torch.cat([given[:layers] + of_layers, given[layers:]])
