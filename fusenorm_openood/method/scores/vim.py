"""ViM: Wang et al., "ViM: out-of-distribution with virtual-logit matching", CVPR 2022."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import COUNT, SHARE, among, checked


@dataclass(frozen=True)
class ViM(Score):
    """Energy less the virtual logit: the norm of the feature outside the principal space.

    The logits must be those of the feature and the head. A `dim` that leaves no residual, because
    there are not more than `dim` features or images, is replaced with half of their number.

    Attributes:
        dim: dimensions of the principal space.
        share: instead of `dim`, as many dimensions as explain at most this share of the variance.
        origin: the principal space goes through the point that the head maps to zero logits
            (`head`), or through the mean ID feature (`mean`).

    >>> ids = torch.tensor([[2.0, 0.0, 0.1], [0.0, 2.0, -0.1], [1.0, 1.0, 0.1]])
    >>> score, head = ViM(dim=2), Head(torch.eye(3)[:2], torch.zeros(2))
    >>> batch = Features(ids, head(ids))
    >>> state = score.fit(score.sums(batch, None), batch, head)
    >>> off = ids + torch.tensor([0.0, 0.0, 5.0])
    >>> (score(Features(off, head(off)), head, state) < score(batch, head, state)).all()
    tensor(True)
    """

    name = "vim"
    title = "ViM"
    needs_fit = True
    needs_head = "affine"
    state = {"origin": "D", "residual": "D R", "scale": ""}

    dim: int = checked(256, COUNT)
    share: float | None = checked(None, SHARE.or_none())
    origin: str = checked("head", among("head", "mean"))

    def sums(self, batch: Features, labels: Tensor) -> State:
        return {**base.feature_sum(batch), "products": base.products(base.fit_features(batch))}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        """Origin, residual space and scale of the virtual logit; the scale is the sample's."""
        feature = base.fit_features(sample)
        if self.origin == "mean":
            origin = base.mean_feature(sums)
        else:
            weight, bias = head.weight.detach().cpu().double(), head.bias.detach().cpu().double()
            rounding = max(weight.shape) * base.ROUNDING  # the weight may have a lower rank
            origin = -torch.linalg.pinv(weight, rtol=rounding) @ bias
        # The products of features less the origin, from those of the features.
        shift = torch.outer(sums["feature"] - sums["images"] / 2 * origin, origin)
        values, vectors = torch.linalg.eigh(sums["products"] - shift - shift.T)
        most = min(int(sums["images"]), len(values))
        dim = self.dim if self.dim < most else most // 2
        if self.share is not None:
            explained = values.flip(0).clamp_min(0).cumsum(dim=0)
            dim = int((explained <= self.share * explained[-1]).sum())
        state = {"origin": origin.float(), "residual": vectors[:, : len(values) - dim].float()}
        length = _residual(feature, state).mean(dtype=torch.float64)
        # Residuals that are rounding errors must not become a scale.
        smallest = base.ROUNDING * feature.norm(dim=1).mean(dtype=torch.float64)
        largest_logit = sample.logits.detach().cpu().double().amax(dim=1).mean()
        state["scale"] = (largest_logit / length.clamp_min(max(float(smallest), base.EPS))).float()
        return state

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        virtual = state["scale"] * _residual(batch.feature, state)
        return batch.logits.logsumexp(dim=1) - virtual

    def images_needed(self, features: int, classes: int) -> int:
        return features


def _residual(feature: Tensor, state: State) -> Tensor:
    return base.row_norms((feature - state["origin"]) @ state["residual"])
