"""LogitGap: "Revisiting logit distributions for reliable OOD detection", NeurIPS 2025."""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import COUNT, checked


@dataclass(frozen=True)
class LogitGap(Score):
    """Mean distance of the largest logit from the `N` next ones; from all, if there are fewer.

    The authors' code (arXiv 2510.20134) has N = 5 for 10 classes, 20 for 100 and 88 for 1000.

    >>> import torch
    >>> logits = torch.tensor([[4.0, 1.0, 3.0, 0.0]])
    >>> LogitGap(N=2)(Features(logits, logits))
    tensor([2.])
    """

    name = "logitgap"
    title = "LogitGap"
    needs_feature = False

    N: int = checked(20, COUNT)

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        top = batch.logits.topk(min(self.N + 1, batch.logits.shape[1]), dim=1).values
        return top[:, 0] - top[:, 1:].mean(dim=1) if top.shape[1] > 1 else 0 * top[:, 0]
