"""From expert scores to confidences and p-values, as in `fusenorm_openood.method`, in torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fusenorm_openood.method.fusion import check_weights
from fusenorm_openood.method.joint import LEAST, SMALLEST, STEEP, JointStatistics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.statistics import IDStatistics


class Roles(NamedTuple):
    """Rows of the strong experts, of the weak ones and of all taps among the experts."""

    strong: Sequence[int]
    weak: Sequence[int]
    taps: Sequence[int]

    @classmethod
    def of(cls, experts: Sequence[str], taps: Sequence[str], strong: Sequence[str]) -> "Roles":
        """The rows of experts by name."""
        weak = [experts.index(name) for name in taps if name not in strong]
        return cls([experts.index(n) for n in strong], weak, [experts.index(n) for n in taps])


class Fusion(nn.Module):
    """Confidences `[N]` from expert scores `[L, N]`, both float64; NaN if a score is not finite.

    Args:
        settings: of the detector.
        roles: what each row of the scores is.
        statistics: of all experts, or with the joint penalty of the strong ones.
        joint: statistics of the joint distance, with the joint penalty or the clip.
    """

    def __init__(
        self,
        settings: Settings,
        roles: Roles,
        statistics: IDStatistics,
        joint: JointStatistics | None,
    ) -> None:
        super().__init__()
        self.settings, self.roles = settings, roles
        self.joint = None if joint is None else (joint.log_mean, joint.log_std, joint.limit)
        constants = vars(statistics) | {
            "weights": check_weights(settings.weights, len(roles.strong))
        }
        if joint is not None:
            blocks = np.count_nonzero(np.isfinite(joint.scale))
            constants |= {
                "block_mean": joint.mean,
                "block_inverse": 1 / joint.scale,  # 0 for a constant block
                "precision": joint.precision / blocks,
            }
        for name, array in constants.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float64, device="cpu"))

    mean: Tensor
    std: Tensor
    lower: Tensor
    upper: Tensor
    weights: Tensor
    block_mean: Tensor
    block_inverse: Tensor
    precision: Tensor

    def forward(self, experts: Tensor) -> Tensor:
        s, roles = self.settings, self.roles
        strong = _rows(experts, roles.strong)
        if s.penalty == "joint":
            bounded = torch.minimum(strong, _column(self.upper)) if s.clip else strong
            z = (bounded - _column(self.mean)) / _column(self.std)
            standardised, far_off = self.joint_penalty(_rows(experts, roles.taps))
            penalty = s.joint_weight * (standardised + far_off)
        else:
            z = self.normalised(strong, roles.strong)
            z = z.clamp(max=1) if s.clip else z
            penalty = self.penalty(self.normalised(_rows(experts, roles.weak), roles.weak))
            if self.joint is not None:
                penalty = penalty + s.cap * self.joint_penalty(_rows(experts, roles.taps))[1]
        conf = (_column(self.weights) * z).sum(0) - penalty
        is_finite = experts.isfinite().all(0)
        return torch.where(is_finite, conf, torch.nan)

    def normalised(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """z of the scores of these experts; see `method.statistics.normalise`."""
        lower, upper = (_column(_rows(t, rows)) for t in (self.lower, self.upper))
        return (scores - lower) / (upper - lower)

    def penalty(self, weak: Tensor) -> Tensor:
        """min(cap, base^D - 1) of normalised scores; see `method.fusion.penalty`."""
        base, cap = self.settings.base, self.settings.cap
        if len(self.roles.weak) == 0 or base == 1:
            return weak.new_zeros(())
        largest = torch.maximum(-weak, weak - 1).amax(0).clamp(min=0)
        limit = math.log1p(cap) / math.log(base)  # base^limit - 1 = cap
        return (largest.clamp(max=limit) * math.log(base)).expm1().clamp(max=cap)

    def joint_penalty(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of `method.joint.joint_penalty`: the standardised log M, and `far_off`."""
        log_mean, log_std, limit = self.joint or (0.0, 1.0, math.inf)
        log_norms = norms.clamp(min=SMALLEST).log()
        u = (log_norms - _column(self.block_mean)) * _column(self.block_inverse)
        squared = (u * (self.precision @ u)).sum(0)
        log_m = squared.clamp(min=0).sqrt().clamp(min=LEAST).log()
        beyond = (log_m - limit).clamp(min=0)
        return (log_m - log_mean) / log_std, STEEP * beyond / log_std


def p_values(conf: Tensor, calibration: Tensor) -> Tensor:
    """Conformal p-values `[N]` of confidences `[N]`, the smallest for NaN.

    See `method.conformal.conformal_p_values`.
    """
    smaller = (calibration <= _column(conf)).sum(1)
    return (1 + smaller).double() / (1 + calibration.shape[0])


def _rows(scores: Tensor, rows: Sequence[int]) -> Tensor:
    return scores[torch.tensor(list(rows), dtype=torch.long, device=scores.device)]


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(1)
