"""Experts that compare features with those of ID images: KNN and SHE.

Scores `[B]` are float32, larger = more in-distribution.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.method.seen import (
    Arguments,
    Head,
    Seen,
    State,
    class_sums,
    feature_sum,
    fit_features,
    fit_labels,
    in_float32,
    mean_feature,
    norms,
    row_parts,
)


def knn_fit(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """L2-normalised features `[N, D]` of the sample."""
    return {"features": F.normalize(fit_features(sample), dim=1)}


@in_float32
def knn_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Negative squared distance between L2-normalised features to the K-th nearest ID image.

    With fewer than K images, to the farthest one.

    Source: Sun et al., ICML 2022.
    """
    return _negative_distance(seen.feature, state["features"], arguments["K"])


def knn_score_fit(
    seen: Seen, head: Head, state: State, arguments: Arguments, labels: Tensor
) -> Tensor:
    """`knn_score` of images of the sample, each without itself; 0 if it is the only one."""
    return knn_score(seen, head, state, {**arguments, "K": arguments["K"] + 1})


def _negative_distance(feature: Tensor, stored: Tensor, rank: int) -> Tensor:
    rank = min(rank, len(stored))
    squares = stored.square().sum(dim=1)  # 1, or 0 for a zero feature
    scores = []
    for part in row_parts(F.normalize(feature, dim=1), len(stored)):
        # 2 a b - |b|^2 ranks the stored b by their distance to a.
        nearness = torch.addmm(squares, part, stored.T, beta=-1, alpha=2)
        kth = nearness.topk(rank, dim=1, sorted=False).values.amin(dim=1)
        scores.append((kth - part.square().sum(dim=1)).clamp_max(0))
    return torch.cat(scores)


def she_sums(seen: Seen, labels: Tensor) -> State:
    """Class sums and counts of correctly classified images, and the sum over all images."""
    feature, labels = fit_features(seen), fit_labels(labels, seen)
    right = labels == seen.logits.cpu().argmax(dim=1)
    sums, counts = class_sums(feature[right], labels[right], seen.logits.shape[1])
    return {**feature_sum(seen, labels), "class_sums": sums, "counts": counts}


def she_fit(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """Mean feature of each class's correctly classified images.

    A class without any has the mean of all images.
    """
    counts, overall = sums["counts"].unsqueeze(1), mean_feature(sums)
    means = torch.where(counts > 0, sums["class_sums"] / counts, overall)
    return {"means": means.float(), "overall": overall.float(), "counts": sums["counts"]}


@in_float32
def she_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Similarity of a feature to the mean feature of its predicted class.

    `metric` is `inner_product`, `cosine` or `euclidean` (negative distance).

    Source: Zhang et al., ICLR 2023.
    """
    target = state["means"][seen.logits.argmax(dim=1)]
    return _similarity(seen.feature, target, arguments["metric"])


@in_float32
def she_score_fit(
    seen: Seen, head: Head, state: State, arguments: Arguments, labels: Tensor
) -> Tensor:
    """`she_score` of images of the fit, each left out of its class's mean.

    An image that is alone in its class is compared with the mean of all images.
    """
    predicted = seen.logits.argmax(dim=1)
    means, counts = state["means"][predicted], state["counts"][predicted].unsqueeze(1)
    others = (means * counts - seen.feature) / (counts - 1).clamp_min(1)
    others = torch.where(counts > 1, others, state["overall"])
    target = torch.where((labels == predicted).unsqueeze(1), others, means)
    return _similarity(seen.feature, target, arguments["metric"])


def _similarity(feature: Tensor, target: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        return F.cosine_similarity(feature, target, dim=1)
    if metric == "euclidean":
        return -norms(feature - target)
    return (feature * target).sum(dim=1)
