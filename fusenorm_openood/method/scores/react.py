"""ReAct: Sun et al., "ReAct: OOD detection with rectified activations", NeurIPS 2021."""

from dataclasses import dataclass

from fusenorm_openood.method.scores.energy import Energy
from fusenorm_openood.method.validation import PERCENTILE, checked


@dataclass(frozen=True)
class ReAct(Energy):
    """Energy, with the penultimate feature clipped at a percentile of its ID activations.

    >>> ReAct(percentile=80).clip_percentile
    80
    """

    name = "react"
    title = "ReAct"
    output = ""
    named = ("percentile",)

    percentile: float = checked(90.0, PERCENTILE)

    @property
    def clip_percentile(self) -> float | None:
        return self.percentile
