"""RAS: arXiv 2604.08572, ECCV 2026."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State


@dataclass(frozen=True)
class RAS(Score):
    """Energy of the feature with its sorted values replaced by the mean sorted ID feature.

    So it depends on the order of a feature's values only. It has no argument.

    >>> ids = Features(torch.tensor([[1.0, 3.0], [5.0, 1.0]]), torch.zeros(2, 2))
    >>> head, score = Head(torch.eye(2), torch.zeros(2)), RAS()
    >>> state = score.fit(score.sums(ids, None), ids, head)
    >>> state["values"]
    tensor([4., 1.])
    >>> score(Features(torch.tensor([[0.0, 7.0]]), torch.zeros(1, 2)), head, state)  # of [1, 4]
    tensor([4.0486])
    """

    name = "ras"
    title = "RAS"
    needs_fit = True
    needs_head = "linear"
    state = {"values": "D"}

    def sums(self, batch: Features, labels: Tensor) -> State:
        ordered = batch.feature.sort(dim=1, descending=True).values
        return base.feature_sum(batch._replace(feature=ordered))

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        return {"values": base.mean_feature(sums).float()}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        order = batch.feature.argsort(dim=1, descending=True, stable=True)
        values = state["values"].expand_as(batch.feature)
        return head(torch.zeros_like(batch.feature).scatter(1, order, values)).logsumexp(dim=1)
