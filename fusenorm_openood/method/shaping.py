"""Activation shaping: SCALE and ASH, the energy of logits recomputed from changed features.

Scores `[B]` are float32, larger = more in-distribution. Neither fits anything.
"""

import torch
from torch import Tensor

from fusenorm_openood.method.seen import Arguments, Head, Seen, State, in_float32

# exp(40) times a feature of 1e18 is still finite in float32.
LARGEST_EXPONENT = 40.0


@in_float32
def ash_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Energy after ASH-B: each kept activation becomes the sum of all over the number kept.

    Source: Djurisic et al., ICLR 2023.
    """
    feature = seen.feature
    kept, index = _largest(feature, arguments["percentile"])
    fill = feature.sum(dim=1, keepdim=True) / kept.shape[1]
    shaped = torch.zeros_like(feature).scatter(1, index, fill.expand_as(kept))
    return head(shaped).logsumexp(dim=1)


@in_float32
def scale_score(seen: Seen, head: Head, state: State, arguments: Arguments) -> Tensor:
    """Energy after SCALE: features times exp(s1 / s2).

    s1 is the sum of all D activations and s2 that of the k largest. Where s2 > 0, s1 / s2 cannot
    exceed D / k, so it is limited to that elsewhere as well, and always to 40: exp stays finite.

    Source: Xu et al., ICLR 2024.
    """
    feature = seen.feature
    kept, _ = _largest(feature, arguments["percentile"])
    ratio = feature.sum(dim=1) / kept.sum(dim=1)
    limit = min(feature.shape[1] / kept.shape[1], LARGEST_EXPONENT)
    factor = ratio.nan_to_num(nan=1.0).clamp(max=limit).exp()  # 0 / 0 only if all are 0
    return head(feature * factor.unsqueeze(1)).logsumexp(dim=1)


def _largest(feature: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The activations above a percentile of each image's, at least one, and their indices."""
    n = feature.shape[1]
    return feature.topk(max(1, n - round(n * percentile / 100)), dim=1)
