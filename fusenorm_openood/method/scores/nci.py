"""NCI: Liu and Qin, "Detecting OOD through the lens of neural collapse", CVPR 2025."""

from dataclasses import dataclass

from torch import Tensor

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import NOT_NEGATIVE, checked


@dataclass(frozen=True)
class NCI(Score):
    """Centred feature's length along its class's weights, plus `alpha` times its L1 norm.

    >>> import torch
    >>> head, feature = Head(torch.eye(2), torch.zeros(2)), torch.tensor([[3.0, 4.0]])
    >>> NCI(alpha=0)(Features(feature, head(feature)), head, {"mean": torch.zeros(2)})
    tensor([0.8000])
    """

    name = "nci"
    title = "NCI"
    needs_fit = True
    needs_head = "affine"
    state = {"mean": "D"}

    alpha: float = checked(0.0001, NOT_NEGATIVE)

    def sums(self, batch: Features, labels: Tensor) -> State:
        return base.feature_sum(batch)

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        return {"mean": base.mean_feature(sums).float()}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        feature = batch.feature
        weight = head.weight[batch.logits.argmax(dim=1)]
        centred = feature - state["mean"]
        proximity = (weight * centred).sum(dim=1) / base.row_norms(centred).clamp_min(base.EPS)
        return proximity + self.alpha * feature.abs().sum(dim=1)
