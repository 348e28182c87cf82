"""MDS++: Mueller and Hein, "Mahalanobis++", ICML 2025.

The Mahalanobis distance is that of Lee et al., NeurIPS 2018.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.scores.base import (
    ROUNDING,
    Features,
    Head,
    Score,
    State,
    class_sums,
    fit_features,
    fit_labels,
    products,
    row_parts,
)

RIDGE = 1e-3  # added to the shared covariance, in units of the mean variance
SMALLEST_VARIANCE = 1e-10  # of normalised features; below it is float32 rounding


@dataclass(frozen=True)
class MDS(Score):
    """Negative squared Mahalanobis distance of the L2-normalised feature to the closest class mean.

    Differs from OpenOOD's `mds` in three ways: features are normalised, RIDGE times the mean
    variance is added to the covariance before it is inverted, so that fewer images than dimensions
    do, and a class without images is left out instead of giving NaN.

    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = MDS(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> (score(Features(-ids.feature, ids.logits), state=state) < score(ids, state=state)).all()
    tensor(True)
    """

    name = "mds"
    title = "MDS++"
    needs_fit = True
    state: ClassVar = {
        "centre": "D",
        "whitening": "D D",
        "means": "M D",
        "counts": "M",
        "classes": "M",
    }

    def sums(self, batch: Features, labels: Tensor) -> State:
        feature = F.normalize(fit_features(batch), dim=1)
        sums, counts = class_sums(feature, fit_labels(labels, batch), batch.logits.shape[1])
        return {"class_sums": sums, "counts": counts, "products": products(feature)}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        classes = sums["counts"].nonzero().flatten()
        counts, images = sums["counts"][classes], sums["counts"].sum()
        of_classes = sums["class_sums"][classes]
        means, centre = of_classes / counts.unsqueeze(1), of_classes.sum(dim=0) / images
        covariance = (sums["products"] - of_classes.T @ means) / images
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp_min(0)  # rounding
        variance = values + RIDGE * values.mean()
        whitening = vectors / variance.clamp_min(SMALLEST_VARIANCE).sqrt()
        return {
            "centre": centre.float(),
            "whitening": whitening.float(),
            "means": ((means - centre) @ whitening).float(),
            "counts": counts,
            "classes": classes,  # of each of the means
        }

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        white, means = _whiten(batch.feature, state), state["means"]
        scores = []
        for part in row_parts(white, len(means)):
            closest = (2 * part @ means.T - means.square().sum(dim=1)).argmax(dim=1)
            scores.append(-(part - means[closest]).square().sum(dim=1))
        return torch.cat(scores)

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        """Each image left out of the means and the covariance, without further fits.

        Leaving an image with residual r out of a class of n subtracts a multiple of r r' from the
        covariance: a rank-one downdate, whose inverse Sherman and Morrison's formula gives. In
        whitened coordinates the covariance is the identity.
        """
        white, means, counts = _whiten(batch.feature, state), state["means"], state["counts"]
        images = int(counts.sum())
        if images == 1:
            return -(white - means).square().sum(dim=1)
        rows = torch.searchsorted(state["classes"], labels.contiguous())
        scores = []
        parts = (row_parts(t, 2 * len(means)) for t in (white, rows))
        for part, own in zip(*parts, strict=True):
            residual = part - means[own]
            n = counts[own].to(part.dtype).unsqueeze(1)
            # Without the image, its residual is n / (n - 1) times as long.
            growth = n / (n - 1).clamp_min(1)
            differences = part.square().sum(dim=1, keepdim=True) - 2 * part @ means.T
            differences += means.square().sum(dim=1)
            inner = (part * residual).sum(dim=1, keepdim=True) - residual @ means.T
            square = residual.square().sum(dim=1, keepdim=True)
            differences.scatter_(1, own.unsqueeze(1), growth.square() * square)
            inner.scatter_(1, own.unsqueeze(1), growth * square)
            weight = growth / images
            left = (1 - weight * square).clamp_min(ROUNDING)
            distances = differences + weight * inner.square() / left
            # The class of a single image has no mean without it.
            single = torch.zeros_like(n).masked_fill(n <= 1, float("inf"))
            distances.scatter_add_(1, own.unsqueeze(1), single)
            scores.append(-distances.amin(dim=1).clamp_min(0))
        return torch.cat(scores)

    def images_needed(self, features: int, classes: int) -> int:
        return features + classes  # less a mean per class


def _whiten(feature: Tensor, state: State) -> Tensor:
    return (F.normalize(feature, dim=1) - state["centre"]) @ state["whitening"]
