"""ASH: Djurisic et al., "Extremely simple activation shaping for OOD detection", ICLR 2023."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.errors import number
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import Rule, checked

PRUNED = Rule("a number >= 0 and < 100", number, lambda v: 0 <= v < 100)


@dataclass(frozen=True)
class ASH(Score):
    """Energy after ASH-B: each kept activation becomes the sum of all over the number kept.

    Activations below a percentile of each image's are set to 0.

    >>> head, feature = Head(torch.eye(2), torch.zeros(2)), torch.tensor([[3.0, 1.0]])
    >>> ASH(percentile=50)(Features(feature, head(feature)), head)  # log(exp(4) + exp(0))
    tensor([4.0181])
    """

    name = "ash"
    title = "ASH"
    needs_head = "linear"

    percentile: float = checked(90, PRUNED)

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        feature = batch.feature
        kept, index = largest(feature, self.percentile)
        fill = feature.sum(dim=1, keepdim=True) / kept.shape[1]
        shaped = torch.zeros_like(feature).scatter(1, index, fill.expand_as(kept))
        return head(shaped).logsumexp(dim=1)


def largest(feature: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The activations above a percentile of each image's, at least one, and their indices."""
    n = feature.shape[1]
    return feature.topk(max(1, n - round(n * percentile / 100)), dim=1)
