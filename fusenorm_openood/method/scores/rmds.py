"""RMDS: Ren et al., "A simple fix to Mahalanobis distance for near-OOD detection", 2021.

RMDS++: Mueller and Hein, "Mahalanobis++", ICML 2025.
"""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores.base import Features, Head, State
from fusenorm_openood.method.scores.mds import Mahalanobis, left_out


@dataclass(frozen=True)
class RMDS(Mahalanobis):
    """`mds` relative to the distance to all ID images, whatever their class.

    The squared Mahalanobis distance of the feature to the mean of all ID images, with their
    covariance, minus that to the closest class mean.

    >>> import torch
    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = RMDS(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> score(ids, state=state).shape
    torch.Size([3])
    """

    name = "rmds"
    title = "RMDS"
    normalised = False
    state = {**Mahalanobis.state, "overall": "D D"}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        total, images = sums["class_sums"].sum(dim=0), sums["counts"].sum()
        covariance = (sums["products"] - total.outer(total) / images) / images
        overall = self._whitening(covariance).float()
        return {**super().fit(sums, sample, head), "overall": overall}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        white = (self._given(batch.feature) - state["centre"]) @ state["overall"]
        return super().score(batch, head, state) + white.square().sum(dim=1)

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        images = int(state["counts"].sum())
        white = (self._given(batch.feature) - state["centre"]) @ state["overall"]
        growth, centre = images / max(images - 1, 1), white.new_zeros(1, white.shape[1])
        own = labels.new_zeros(len(white))
        distances = left_out(white, centre, own, growth, 1 / images).squeeze(1)
        return super().score_fit(batch, head, state, labels) + distances


@dataclass(frozen=True)
class RMDSPlusPlus(RMDS):
    """`rmds` of the L2-normalised feature, with the covariances of `mds++`.

    >>> RMDSPlusPlus.normalised, RMDS.normalised
    (True, False)
    """

    name = "rmds++"
    title = "RMDS++"
    normalised = True
