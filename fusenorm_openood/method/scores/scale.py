"""SCALE: Xu et al., "Scaling for training time and post-hoc OOD detection", ICLR 2024."""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores.ash import PRUNED, largest, scaling
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import checked


@dataclass(frozen=True)
class SCALE(Score):
    """Energy after SCALE: features times exp(s1 / s2).

    s1 is the sum of all D activations and s2 that of the k largest. Where s2 > 0, s1 / s2 cannot
    exceed D / k, so it is limited to that elsewhere as well, and always to 40: exp stays finite.

    >>> import torch
    >>> head, feature = Head(torch.eye(2), torch.zeros(2)), torch.tensor([[1.0, 0.0]])
    >>> SCALE(percentile=50)(Features(feature, head(feature)), head)  # log(exp(e) + exp(0))
    tensor([2.7822])
    """

    name = "scale"
    title = "SCALE"
    needs_head = "linear"

    percentile: float = checked(85, PRUNED)

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        kept, _ = largest(batch.feature, self.percentile)
        return head(batch.feature * scaling(batch.feature, kept)).logsumexp(dim=1)
