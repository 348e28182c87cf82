"""fDBD: Liu and Qin, "Fast decision boundary based out-of-distribution detector", ICML 2024."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import SWITCH, checked


@dataclass(frozen=True)
class FDBD(Score):
    """Sum of a feature's distances to the boundaries of its class, over its distance to the mean.

    With `distance_as_normalizer=False`, over the norm of the feature.

    >>> head, feature = Head(torch.eye(2), torch.zeros(2)), torch.tensor([[3.0, 1.0]])
    >>> score, ids = FDBD(), Features(torch.zeros(1, 2), torch.zeros(1, 2))
    >>> state = score.fit(score.sums(ids, None), ids, head)
    >>> score(Features(feature, head(feature)), head, state)  # sqrt(2) / sqrt(10)
    tensor([0.4472])
    """

    name = "fdbd"
    title = "fDBD"
    needs_fit = True
    needs_head = "affine"
    state = {"mean": "D", "inverse": "K K"}

    distance_as_normalizer: bool = checked(True, SWITCH)

    def sums(self, batch: Features, labels: Tensor) -> State:
        return base.feature_sum(batch)

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        """Mean feature, and 1 / ||w_p - w_q||, which turns gaps of logits into distances."""
        weight = head.weight.detach().cpu().double()
        gaps = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
        # No boundary separates a class from itself, or from one with the same weights.
        inverse = torch.where(gaps > base.EPS, 1 / gaps, 0.0)
        return {"mean": base.mean_feature(sums).float(), "inverse": inverse.float()}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        top, predicted = batch.logits.max(dim=1)
        distances = (top.unsqueeze(1) - batch.logits) * state["inverse"][predicted]
        origin = state["mean"] if self.distance_as_normalizer else 0.0
        return distances.sum(dim=1) / base.row_norms(batch.feature - origin).clamp_min(base.EPS)
