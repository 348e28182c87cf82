"""Energy: Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020."""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores.base import LogitScore


@dataclass(frozen=True)
class Energy(LogitScore):
    """Negative free energy T logsumexp(logits / T).

    >>> import torch
    >>> Energy().of_logits(torch.tensor([[0.0, 0.0]]))
    tensor([0.6931])
    """

    name = "ebo"
    title = "Energy"
    output = "energy"
    named = ("temperature",)

    def of_logits(self, logits: Tensor) -> Tensor:
        return self.temperature * (logits / self.temperature).logsumexp(dim=1)
