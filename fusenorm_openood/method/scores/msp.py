"""MSP: Hendrycks and Gimpel, "A baseline for detecting misclassified and OOD examples", 2017."""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores.base import LogitScore, log_odds


@dataclass(frozen=True)
class MSP(LogitScore):
    """Maximum softmax probability, in (1/K, 1]; it saturates at 1.

    >>> import torch
    >>> MSP().of_logits(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    tensor([0.8808, 0.5000])
    """

    name = "msp"
    title = "MSP"
    output = "msp"

    def of_logits(self, logits: Tensor) -> Tensor:
        scaled = logits / self.temperature
        return log_odds(scaled) if self.fused else scaled.softmax(dim=1).amax(dim=1)
