"""Experts computed from the logits and the geometry of the final layer: GEN, fDBD and NCI.

Scores `[B]` are float32, larger = more in-distribution.
"""

import torch
from torch import Tensor

from fusenorm_openood.method.seen import (
    EPS,
    Arguments,
    Head,
    Seen,
    State,
    in_float32,
    mean_feature,
    norms,
)


@in_float32
def gen_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Negative generalised entropy of the `M` largest softmax probabilities.

    sum of (p (1 - p))^gamma, computed from log p and log(1 - p): where the network is so sure that
    1 - p rounds to 0 in float32, OpenOOD's scores jump and these do not.

    Source: Liu et al., CVPR 2023.
    """
    logits = seen.logits
    gamma: float = arguments["gamma"]
    log_p, index = logits.log_softmax(dim=1).topk(min(arguments["M"], logits.shape[1]), dim=1)
    rest = logits.scatter(1, index[:, :1], float("-inf")).logsumexp(dim=1)
    # log(1 - p) of the most likely class comes from the other classes; p <= 1/2 in those.
    top = rest - logits.logsumexp(dim=1)
    log_q = torch.cat([top.unsqueeze(1), torch.log1p(-log_p[:, 1:].exp())], dim=1)
    return -(gamma * (log_p + log_q)).exp().sum(dim=1)


def fdbd_fit(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """Mean feature, and distances `||w_p - w_q||` that turn logit gaps into distances `[K, K]`."""
    weight = head.weight.detach().cpu().double()
    gaps = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
    # No boundary separates a class from itself, or from one with the same weights.
    inverse = torch.where(gaps > EPS, 1 / gaps, 0.0)
    return {"mean": mean_feature(sums).float(), "inverse": inverse.float()}


@in_float32
def fdbd_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Sum of a feature's distances to the boundaries of its class, over its distance to the mean.

    With `distance_as_normalizer=False`, over the norm of the feature.

    Source: Liu and Qin, ICML 2024 (fDBD).
    """
    feature, logits = seen.feature, seen.logits
    top, predicted = logits.max(dim=1)
    distances = (top.unsqueeze(1) - logits) * state["inverse"][predicted]
    origin = state["mean"] if arguments["distance_as_normalizer"] else 0.0
    return distances.sum(dim=1) / norms(feature - origin).clamp_min(EPS)


def nci_fit(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """Mean feature."""
    return {"mean": mean_feature(sums).float()}


@in_float32
def nci_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Centred feature's length along its class's weights, plus `alpha` times its L1 norm.

    Source: Liu and Qin, CVPR 2025 (NCI).
    """
    feature = seen.feature
    weight = head.weight[seen.logits.argmax(dim=1)]
    centred = feature - state["mean"]
    proximity = (weight * centred).sum(dim=1) / norms(centred).clamp_min(EPS)
    alpha: float = arguments["alpha"]
    return proximity + alpha * feature.abs().sum(dim=1)
