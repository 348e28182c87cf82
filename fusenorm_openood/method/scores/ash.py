"""ASH: Djurisic et al., "Extremely simple activation shaping for OOD detection", ICLR 2023."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.errors import number
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import Rule, among, checked

LARGEST_EXPONENT = 40.0  # exp(40) times a feature of 1e18 is still finite in float32
PRUNED = Rule("a number >= 0 and < 100", number, lambda v: 0 <= v < 100)


@dataclass(frozen=True)
class ASH(Score):
    """Energy after ASH: activations below a percentile of each image's are set to 0.

    `variant` is what becomes of the others: `b`, each the sum of all activations over the number
    kept; `s`, times exp(s1 / s2) as in `SCALE`; `p`, nothing. Packages differ in variant and
    percentile: OpenOOD has `b` at 90, the others `s`; see the page on other packages.

    >>> head, feature = Head(torch.eye(2), torch.zeros(2)), torch.tensor([[3.0, 1.0]])
    >>> ASH(percentile=50)(Features(feature, head(feature)), head)  # log(exp(4) + exp(0))
    tensor([4.0181])
    """

    name = "ash"
    title = "ASH"
    needs_head = "linear"

    percentile: float = checked(90, PRUNED)
    variant: str = checked("b", among("b", "s", "p"))

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        feature = batch.feature
        kept, index = largest(feature, self.percentile)
        if self.variant == "b":
            fill = feature.sum(dim=1, keepdim=True) / kept.shape[1]
            filled = fill.expand_as(kept)
        else:
            filled = kept if self.variant == "p" else kept * scaling(feature, kept)
        return head(torch.zeros_like(feature).scatter(1, index, filled)).logsumexp(dim=1)


def largest(feature: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The activations above a percentile of each image's, at least one, and their indices."""
    n = feature.shape[1]
    return feature.topk(max(1, n - round(n * percentile / 100)), dim=1)


def scaling(feature: Tensor, kept: Tensor) -> Tensor:
    """exp(s1 / s2) `[B, 1]` of the sums of all activations `[B, D]` and of the kept `[B, k]`."""
    ratio = feature.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
    limit = min(feature.shape[1] / kept.shape[1], LARGEST_EXPONENT)
    return ratio.nan_to_num(nan=1.0).clamp(max=limit).exp()  # 0 / 0 only if all are 0
