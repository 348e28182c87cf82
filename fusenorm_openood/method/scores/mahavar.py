"""MahaVar: Kim and Yoon, "OOD detection via class-wise Mahalanobis distance variance", 2026."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.method.scores.mds import Mahalanobis
from fusenorm_openood.method.validation import NOT_NEGATIVE, checked


@dataclass(frozen=True)
class MahaVar(Mahalanobis):
    """`mds++` plus `weight` times the variance of the squared distances to the class means.

    ID images are close to one class and far from all others. The form is that of the
    abstract of arXiv 2605.14413; the default weight is this package's choice.

    >>> from fusenorm_openood.method.scores.base import Features
    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = MahaVar(weight=0.1), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> (score(ids, state=state) > MahaVar(weight=0)(ids, state=state)).all()
    tensor(True)
    """

    name = "mahavar"
    title = "MahaVar"

    weight: float = checked(0.001, NOT_NEGATIVE)

    def of_distances(self, distances: Tensor) -> Tensor:
        known = distances.isfinite()
        count = known.sum(dim=1, keepdim=True)
        mean = torch.where(known, distances, 0).sum(dim=1, keepdim=True) / count
        variance = torch.where(known, distances - mean, 0).square().sum(dim=1) / count.squeeze(1)
        return self.weight * variance - distances.amin(dim=1)
