"""RMDS++: Mueller and Hein, "Mahalanobis++", ICML 2025."""

from dataclasses import dataclass

from fusenorm_openood.method.scores.rmds import RMDS


@dataclass(frozen=True)
class RMDSPlusPlus(RMDS):
    """`rmds` of the L2-normalised feature, with the covariances of `mds++`.

    >>> import torch
    >>> from fusenorm_openood.method.scores.base import Features
    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = RMDSPlusPlus(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> score(ids, state=state).shape
    torch.Size([3])
    """

    name = "rmds++"
    title = "RMDS++"
    normalised = True
