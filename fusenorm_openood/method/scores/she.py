"""SHE: Zhang et al., "OOD detection based on in-distribution data patterns memorization", 2023."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import among, checked


@dataclass(frozen=True)
class SHE(Score):
    """Similarity of a feature to the mean feature of its predicted class.

    The mean is that of the correctly classified ID images, or of all of them for a class without
    any. `metric` is `inner_product`, `cosine` or `euclidean` (negative distance).

    >>> score, ids = SHE(), Features(torch.eye(2), torch.eye(2))
    >>> state = score.fit(score.sums(ids, torch.tensor([0, 1])), ids, None)
    >>> score(Features(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])), state=state)
    tensor([3.])
    """

    name = "she"
    title = "SHE"
    needs_fit = True
    state = {"means": "K D", "overall": "D", "counts": "K"}

    metric: str = checked("inner_product", among("inner_product", "cosine", "euclidean"))

    def sums(self, batch: Features, labels: Tensor) -> State:
        feature, labels = base.fit_features(batch), base.fit_labels(labels, batch)
        right = labels == batch.logits.cpu().argmax(dim=1)
        sums, counts = base.class_sums(feature[right], labels[right], batch.logits.shape[1])
        return {**base.feature_sum(batch), "class_sums": sums, "counts": counts}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        counts, overall = sums["counts"].unsqueeze(1), base.mean_feature(sums)
        means = torch.where(counts > 0, sums["class_sums"] / counts, overall)
        return {"means": means.float(), "overall": overall.float(), "counts": sums["counts"]}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        target = state["means"][batch.logits.argmax(dim=1)]
        return self._similarity(batch.feature, target)

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        """Each image left out of its class's mean; one that is alone has the mean of all images."""
        predicted = batch.logits.argmax(dim=1)
        means, counts = state["means"][predicted], state["counts"][predicted].unsqueeze(1)
        others = (means * counts - batch.feature) / (counts - 1).clamp_min(1)
        others = torch.where(counts > 1, others, state["overall"])
        target = torch.where((labels == predicted).unsqueeze(1), others, means)
        return self._similarity(batch.feature, target)

    def images_needed(self, features: int, classes: int) -> int:
        return classes

    def _similarity(self, feature: Tensor, target: Tensor) -> Tensor:
        if self.metric == "cosine":
            return F.cosine_similarity(feature, target, dim=1)
        if self.metric == "euclidean":
            return -base.row_norms(feature - target)
        return (feature * target).sum(dim=1)
