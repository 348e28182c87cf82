"""Experts that know how the features of ID images vary: MDS++ (Mahalanobis++) and ViM.

Scores `[B]` are float32, larger = more in-distribution.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.seen import (
    EPS,
    Arguments,
    Head,
    Seen,
    State,
    class_sums,
    feature_sum,
    fit_features,
    fit_labels,
    in_float32,
    norms,
    products,
    row_parts,
    rows_per_part,
)

RIDGE = 1e-3  # added to the shared covariance, in units of the mean variance
SMALLEST_VARIANCE = 1e-10  # of normalised features; below it is float32 rounding
ROUNDING = float(torch.finfo(torch.float32).eps)


def mds_sums(seen: Seen, labels: Tensor) -> State:
    """Class sums, counts and products of L2-normalised features."""
    feature, labels = F.normalize(fit_features(seen), dim=1), fit_labels(labels, seen)
    sums, counts = class_sums(feature, labels, seen.logits.shape[1])
    return {"class_sums": sums, "counts": counts, "products": products(feature)}


def mds_fit(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """Class means and shared covariance of L2-normalised features.

    Differs from OpenOOD's `mds` in three ways: features are normalised, RIDGE times the mean
    variance is added to the covariance before it is inverted, so that fewer images than dimensions
    do, and a class without images is left out instead of giving NaN.

    Source: Lee et al., NeurIPS 2018; Mueller and Hein, ICML 2025 (Mahalanobis++).
    """
    classes = sums["counts"].nonzero().flatten()
    counts, images = sums["counts"][classes], sums["counts"].sum()
    class_sums = sums["class_sums"][classes]
    means, centre = class_sums / counts.unsqueeze(1), class_sums.sum(dim=0) / images
    covariance = (sums["products"] - class_sums.T @ means) / images
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


@in_float32
def mds_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Negative squared Mahalanobis distance to the closest class mean; see `mds_fit`."""
    white, means = _whiten(seen.feature, state), state["means"]
    scores = []
    for part in row_parts(white, len(means)):
        closest = (2 * part @ means.T - means.square().sum(dim=1)).argmax(dim=1)
        scores.append(-(part - means[closest]).square().sum(dim=1))
    return torch.cat(scores)


@in_float32
def mds_score_fit(
    seen: Seen, head: Head, state: State, arguments: Arguments, labels: Tensor
) -> Tensor:
    """`mds_score` of images of the fit, each left out of the means and the covariance.

    A rank-one update of the inverse gives these scores without further fits. In-sample scores
    would be far too high unless there are many more images than dimensions.
    """
    white, means, counts = _whiten(seen.feature, state), state["means"], state["counts"]
    images = int(counts.sum())
    if images == 1:
        return -(white - means).square().sum(dim=1)
    rows = torch.searchsorted(state["classes"], labels.contiguous())
    scores = []
    size = rows_per_part(2 * len(means))
    for part, own in zip(*(torch.split(t, size) for t in (white, rows)), strict=True):
        residual = part - means[own]
        n = counts[own].to(part.dtype).unsqueeze(1)
        # Without the image, its residual is n / (n - 1) times as long.
        growth = n / (n - 1).clamp_min(1)
        differences = part.square().sum(dim=1, keepdim=True) - 2 * part @ means.T
        differences += means.square().sum(dim=1)
        products = (part * residual).sum(dim=1, keepdim=True) - residual @ means.T
        square = residual.square().sum(dim=1, keepdim=True)
        differences.scatter_(1, own.unsqueeze(1), growth.square() * square)
        products.scatter_(1, own.unsqueeze(1), growth * square)
        share = growth / images
        left = (1 - share * square).clamp_min(ROUNDING)
        distances = differences + share * products.square() / left
        # The class of a single image has no mean without it.
        single = torch.zeros_like(n).masked_fill(n <= 1, float("inf"))
        distances.scatter_add_(1, own.unsqueeze(1), single)
        scores.append(-distances.amin(dim=1).clamp_min(0))
    return torch.cat(scores)


def _whiten(feature: Tensor, state: State) -> Tensor:
    return (F.normalize(feature, dim=1) - state["centre"]) @ state["whitening"]


def vim_sums(seen: Seen, labels: Tensor) -> State:
    """Sum and products of the features."""
    return {**feature_sum(seen, labels), "products": products(fit_features(seen))}


def vim_fit(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """Origin, residual space and scale of the virtual logit; the scale is that of the sample.

    A `dim` that leaves no residual, because there are not more than `dim` features or images, is
    replaced with half of their number.
    """
    feature = fit_features(sample)
    weight, bias = head.weight.detach().cpu().double(), head.bias.detach().cpu().double()
    rounding = max(weight.shape) * torch.finfo(torch.float32).eps  # it may have a lower rank
    origin = -torch.linalg.pinv(weight, rtol=rounding) @ bias
    # The products of features less the origin, from those of the features.
    shift = torch.outer(sums["feature"] - sums["images"] / 2 * origin, origin)
    values, vectors = torch.linalg.eigh(sums["products"] - shift - shift.T)
    dim, most = arguments["dim"], min(int(sums["images"]), len(values))
    dim = dim if dim < most else most // 2
    state = {"origin": origin.float(), "residual": vectors[:, : len(values) - dim].float()}
    length = _residual(feature, state).mean(dtype=torch.float64)
    # Residuals that are rounding errors must not become a scale.
    smallest = ROUNDING * feature.norm(dim=1).mean(dtype=torch.float64)
    largest_logit = sample.logits.detach().cpu().double().amax(dim=1).mean()
    state["scale"] = (largest_logit / length.clamp_min(max(float(smallest), EPS))).float()
    return state


@in_float32
def vim_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Energy less the virtual logit: the norm of the feature outside the principal space.

    The logits must be those of the feature and the head.

    Source: Wang et al., CVPR 2022.
    """
    return seen.logits.logsumexp(dim=1) - state["scale"] * _residual(seen.feature, state)


def _residual(feature: Tensor, state: State) -> Tensor:
    return norms((feature - state["origin"]) @ state["residual"])
