"""T2FNorm: Regmi et al., "T2FNorm: train-time feature normalization for OOD detection", 2024."""

from dataclasses import dataclass

from fusenorm_openood.method.scores.msp import MSP


@dataclass(frozen=True)
class T2FNorm(MSP):
    """MSP of the scoring logits of a network that was trained with T2FNorm.

    >>> import torch
    >>> T2FNorm().of_logits(torch.tensor([[2.0, 0.0]]))
    tensor([0.8808])
    """

    name = "t2fnorm"
    title = "T2FNorm"
    output = ""
    needs_t2fnorm = True
