"""KNN: Sun et al., "Out-of-distribution detection with deep nearest neighbors", ICML 2022."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import COUNT, SWITCH, checked


@dataclass(frozen=True)
class KNN(Score):
    """Negative squared distance between L2-normalised features to the K-th nearest ID image.

    With fewer than K images, to the farthest one. With `root`, the distance itself, which ranks
    the same.

    >>> ids, one = torch.eye(2), torch.tensor([[3.0, 0.0]])
    >>> score = KNN(K=2)
    >>> score(Features(one, one), state=score.fit({}, Features(ids, ids), None))
    tensor([-2.])
    """

    name = "knn"
    title = "KNN"
    needs_fit = True
    state = {"features": "N D"}

    K: int = checked(50, COUNT)
    root: bool = checked(False, SWITCH)

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        return {"features": F.normalize(base.fit_features(sample), dim=1)}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        stored = state["features"]
        rank = min(self.K, len(stored))
        squares = stored.square().sum(dim=1)  # 1, or 0 for a zero feature
        scores = []
        for part in base.row_parts(F.normalize(batch.feature, dim=1), len(stored)):
            # 2 a b - |b|^2 ranks the stored b by their distance to a.
            nearness = torch.addmm(squares, part, stored.T, beta=-1, alpha=2)
            kth = nearness.topk(rank, dim=1, sorted=False).values.amin(dim=1)
            scores.append((kth - part.square().sum(dim=1)).clamp_max(0))
        found = torch.cat(scores)
        return -(-found).sqrt() if self.root else found

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        """Each image without itself; 0 if it is the only one."""
        return replace(self, K=self.K + 1).score(batch, head, state)

    def images_needed(self, features: int, classes: int) -> int:
        return self.K + 1
