"""MDS: Lee et al., "A simple unified framework for detecting OOD samples", NeurIPS 2018.

MDS++: Mueller and Hein, "Mahalanobis++", ICML 2025. Their distances are those of other scores, too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.scores import base
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import among, checked

RIDGE = 1e-3  # added to the covariance of normalised features, in units of the mean variance
SMALLEST_VARIANCE = 1e-10  # of normalised features; below it is float32 rounding


@dataclass(frozen=True)
class Mahalanobis(Score):
    """A function of the squared distances of a feature to the class means.

    A subclass has `of_distances`. With `normalised`, features are divided by their L2 norm, and
    `RIDGE` times the mean variance is added to the covariance before it is inverted, so that fewer
    images than dimensions do. Without, directions in which the ID features do not vary are left
    out, as by a pseudo-inverse. A class without images is left out.

    `class_mean` is the mean that counts: the `closest`, or that of the `predicted` class (the
    closest for a class that is left out).
    """

    needs_fit = True
    normalised = True
    state = {
        "centre": "D",
        "whitening": "D D",
        "means": "M D",
        "counts": "M",
        "classes": "M",
    }

    class_mean: str = checked("closest", among("closest", "predicted"))

    def of_distances(self, distances: Tensor) -> Tensor:
        """Scores `[B]` of squared distances `[B, M]`; infinite for a class that is left out."""
        return -distances.amin(dim=1)

    def sums(self, batch: Features, labels: Tensor) -> State:
        feature, labels = self._given(base.fit_features(batch)), base.fit_labels(labels, batch)
        sums, counts = base.class_sums(feature, labels, batch.logits.shape[1])
        return {"class_sums": sums, "counts": counts, "products": base.products(feature)}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        classes = sums["counts"].nonzero().flatten()
        counts, images = sums["counts"][classes], sums["counts"].sum()
        of_classes = sums["class_sums"][classes]
        means, centre = of_classes / counts.unsqueeze(1), of_classes.sum(dim=0) / images
        covariance = (sums["products"] - of_classes.T @ means) / images
        whitening = self._whitening(covariance)
        return {
            "centre": centre.float(),
            "whitening": whitening.float(),
            "means": ((means - centre) @ whitening).float(),
            "counts": counts,
            "classes": classes,  # of each of the means
        }

    def _whitening(self, covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp_min(0)  # rounding
        if self.normalised:
            variance = (values + RIDGE * values.mean()).clamp_min(SMALLEST_VARIANCE)
        else:
            varies = values > len(values) * base.ROUNDING * values.amax()
            variance = torch.where(varies, values, torch.inf)
        found: Tensor = vectors / variance.sqrt()
        return found

    def _given(self, feature: Tensor) -> Tensor:
        return F.normalize(feature, dim=1) if self.normalised else feature

    def _whitened(self, feature: Tensor, state: State) -> Tensor:
        return (self._given(feature) - state["centre"]) @ state["whitening"]

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        white, means = self._whitened(batch.feature, state), state["means"]
        scores = []
        parts = (base.row_parts(t, len(means)) for t in (white, batch.logits))
        for part, logits in zip(*parts, strict=True):
            distances = squared_distances(part, means)
            scores.append(self.of_distances(self._that_count(distances, logits, state)))
        return torch.cat(scores)

    def _that_count(self, distances: Tensor, logits: Tensor, state: State) -> Tensor:
        """Distances `[B, M]`, infinite to the means that `class_mean` leaves out."""
        if self.class_mean == "closest":
            return distances
        other = logits.argmax(dim=1, keepdim=True) != state["classes"]
        return distances.masked_fill(other & ~other.all(dim=1, keepdim=True), torch.inf)

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        """Each image left out of the means and the covariance, without further fits."""
        white, means, counts = self._whitened(batch.feature, state), state["means"], state["counts"]
        images = int(counts.sum())
        if images == 1:
            return self.score(batch, head, state)
        rows = torch.searchsorted(state["classes"], labels.contiguous())
        scores = []
        parts = (base.row_parts(t, 2 * len(means)) for t in (white, rows, batch.logits))
        for part, own, logits in zip(*parts, strict=True):
            n = counts[own].to(part.dtype).unsqueeze(1)
            # Without the image, its residual is n / (n - 1) times as long.
            distances = left_out(part, means, own, n / (n - 1).clamp_min(1), 1 / images)
            # The class of a single image has no mean without it.
            single = torch.zeros_like(n).masked_fill(n <= 1, float("inf"))
            distances = distances.scatter_add(1, own.unsqueeze(1), single)
            scores.append(self.of_distances(self._that_count(distances, logits, state)))
        return torch.cat(scores)

    def images_needed(self, features: int, classes: int) -> int:
        return features + classes  # less a mean per class


@dataclass(frozen=True)
class MDS(Mahalanobis):
    """Negative squared Mahalanobis distance of the feature to the closest class mean.

    The published score, of the penultimate feature. Directions in which the ID features do not
    vary, and classes without images, are left out; OpenOOD gives NaN for these.

    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = MDS(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> (score(Features(-ids.feature, ids.logits), state=state) < score(ids, state=state)).all()
    tensor(True)
    """

    name = "mds"
    title = "MDS"
    normalised = False


@dataclass(frozen=True)
class MDSPlusPlus(Mahalanobis):
    """Negative squared Mahalanobis distance of the L2-normalised feature to the closest class mean.

    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = MDSPlusPlus(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> torch.equal(score(Features(9 * ids.feature, ids.logits), state=state),
    ...             score(ids, state=state))
    True
    """

    name = "mds++"
    title = "MDS++"


def squared_distances(white: Tensor, means: Tensor) -> Tensor:
    """Squared distances `[B, M]` of whitened features `[B, D]` to means `[M, D]`."""
    squares = white.square().sum(dim=1, keepdim=True) + means.square().sum(dim=1)
    return (squares - 2 * white @ means.T).clamp_min(0)


def left_out(
    white: Tensor, means: Tensor, own: Tensor, growth: Tensor | float, share: float
) -> Tensor:
    """Squared distances `[B, M]` of images of the fit, each left out of it.

    From whitened features `[B, D]` and means `[M, D]`, of which each image's `own` is `[B]`.
    Leaving out an image with residual r subtracts a multiple of r r' from the covariance, in which
    it has the weight `share`: a rank-one downdate, whose inverse Sherman and Morrison's formula
    gives. In whitened coordinates the covariance is the identity. The residual itself is `growth`
    `[B, 1]` times as long without the image.
    """
    residual = white - means[own]
    inner = (white * residual).sum(dim=1, keepdim=True) - residual @ means.T
    square = residual.square().sum(dim=1, keepdim=True)
    weight, rows = growth * share, own.unsqueeze(1)
    distances = squared_distances(white, means).scatter(1, rows, growth * growth * square)
    inner = inner.scatter(1, rows, growth * square)
    left = (1 - weight * square).clamp_min(base.ROUNDING)
    return distances + weight * inner.square() / left
