"""The share of each expert in a confidence: `[L, N]` that add up to the confidences `[N]`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.method.fusion import check_weights, deviation, penalty
from fusenorm_openood.method.joint import JointStatistics, standardised_logs

Array = NDArray[np.float64]


def strong_shares(strong: Array, weights: Sequence[float] | None) -> Array:
    """Shares `[S, N]` of the strong experts in their weighted mean."""
    shares: Array = check_weights(weights, len(strong))[:, None] * strong
    return shares


def weak_shares(weak: Array, base: float, cap: float) -> Array:
    """Shares `[W, N]` of the weak experts: the one that deviates most has the whole penalty."""
    shares = np.zeros_like(weak)
    if len(weak):
        worst = deviation(weak).argmax(axis=0)
        shares[worst, np.arange(weak.shape[1])] = -penalty(weak, base, cap)
    return shares


def joint_shares(norms: Array, statistics: JointStatistics, penalty: Array) -> Array:
    """Shares `[L, N]` of the blocks in a penalty `[N]`, by their terms of the joint distance.

    With u the standardised log norms and P their precision, block l has the part
    u_l (P u)_l of the squared distance u' P u.
    """
    u = standardised_logs(norms, statistics)
    terms = u * (statistics.precision @ u)
    total = terms.sum(axis=0)
    even = np.full_like(terms, 1 / len(terms))
    parts = np.divide(terms, total, out=even, where=total > 0)
    shares: Array = -penalty * parts
    return shares
