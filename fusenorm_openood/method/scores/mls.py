"""MLS: Hendrycks et al., "Scaling OOD detection for real-world settings", ICML 2022."""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores.base import LogitScore


@dataclass(frozen=True)
class MLS(LogitScore):
    """Maximum logit.

    >>> import torch
    >>> MLS().of_logits(torch.tensor([[2.0, 0.0]]))
    tensor([2.])
    """

    name = "mls"
    title = "MLS"
    output = "mls"

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits.amax(dim=1)
