"""Head-tied Mahalanobis distance: class means that follow from the weights of the head."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.scores import base, mds
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.scores.mds import left_out, squared_distances


@dataclass(frozen=True)
class HeadMDS(Score):
    """Negative squared Mahalanobis distance to the closest class mean, the means tied to the head.

    The mean of class c is g + a (w_c - w), for L2-normalised features with mean g, class weights
    w_c, the mean w of the weights of the predicted classes, and the slope a by least squares. So a
    class needs no ID image, and a thousand classes no more images than ten. The covariance of the
    distances to the means of the predicted classes is shrunk towards a multiple of the identity, by
    as much as the number of images asks for: see `oas`.

    >>> head = Head(torch.eye(2), torch.zeros(2))
    >>> ids = torch.tensor([[2.0, 0.1], [3.0, 0.5], [0.2, 1.0], [0.1, 3.0]])
    >>> batch, score = Features(ids, ids), HeadMDS()
    >>> state = score.fit(score.sums(batch, None), batch, head)
    >>> (score(Features(-ids, -ids), head, state) < score(batch, head, state)).all()
    tensor(True)
    """

    name = "head_mds"
    title = "Head-tied MDS"
    needs_fit = True
    needs_head = "affine"
    state = {"centre": "D", "whitening": "D D", "means": "K D", "shrinkage": "", "images": ""}

    def sums(self, batch: Features, labels: Tensor) -> State:
        feature = F.normalize(base.fit_features(batch), dim=1)
        predicted = batch.logits.detach().cpu().argmax(dim=1)
        sums, counts = base.class_sums(feature, predicted, batch.logits.shape[1])
        return {"class_sums": sums, "counts": counts, "products": base.products(feature)}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        of_classes, counts = sums["class_sums"], sums["counts"].double()
        images, weight = counts.sum(), head.weight.detach().cpu().double()
        centre, centred = of_classes.sum(dim=0) / images, weight - counts @ weight / images
        spread = (counts * centred.square().sum(dim=1)).sum()
        slope = (of_classes * centred).sum() / spread.clamp_min(mds.SMALLEST_VARIANCE)
        means = centre + slope * centred
        cross = of_classes.T @ means
        covariance = sums["products"] - cross - cross.T + (means.T * counts) @ means
        values, vectors = torch.linalg.eigh(covariance / images)
        values = values.clamp_min(0)  # rounding
        shrinkage = oas(values, int(images))
        variance = (1 - shrinkage) * values + shrinkage * values.mean()
        whitening = vectors / variance.clamp_min(mds.SMALLEST_VARIANCE).sqrt()
        return {
            "centre": centre.float(),
            "whitening": whitening.float(),
            "means": ((means - centre) @ whitening).float(),
            "shrinkage": images.new_tensor(shrinkage).float(),
            "images": images.float(),
        }

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        white, means = _whitened(batch.feature, state), state["means"]
        parts = base.row_parts(white, len(means))
        return torch.cat([-squared_distances(part, means).amin(dim=1) for part in parts])

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        """Each image left out of the covariance; the mean and the slope keep it."""
        white, means = _whitened(batch.feature, state), state["means"]
        share = (1 - self.shrinkage(state)) / float(state["images"])
        own = batch.logits.argmax(dim=1)
        parts = zip(*(base.row_parts(t, 2 * len(means)) for t in (white, own)), strict=True)
        return torch.cat([-left_out(p, means, o, 1.0, share).amin(dim=1) for p, o in parts])

    def shrinkage(self, state: State) -> float:
        return float(state["shrinkage"])


def oas(values: Tensor, images: int) -> float:
    """Oracle approximating shrinkage in [0, 1] of a covariance with these eigenvalues `[D]`.

    Its share of the identity, times the mean variance: the one of least expected squared error for
    Gaussian features. Source: Chen et al., "Shrinkage algorithms for MMSE covariance estimation",
    IEEE Transactions on Signal Processing 2010; `sklearn.covariance.oas`.

    >>> oas(torch.tensor([1.0, 1.0]), 10), oas(torch.tensor([3.0, 0.1]), 10_000) < 0.001
    (1.0, True)
    """
    squares, square = float(values.square().sum()), float(values.sum()) ** 2
    spread = (images + 1) * (squares - square / len(values))
    return 1.0 if spread <= 0 else min(1.0, (squares + square) / spread)


def _whitened(feature: Tensor, state: State) -> Tensor:
    return (F.normalize(feature, dim=1) - state["centre"]) @ state["whitening"]
