"""The share of each expert in a confidence: `[L, N]` that add up to the confidences `[N]`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.method.fusion import check_weights, deviation, penalty
from fusenorm_openood.method.joint import JointStatistics, far_off, joint_penalty, standardised_logs

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


def joint_shares(norms: Array, statistics: JointStatistics, weight: float) -> Array:
    """Shares `[L, N]` of the blocks in the joint penalty, by their terms of the distance."""
    terms = joint_terms(norms, statistics)
    total = terms.sum(axis=0)
    even = np.full_like(terms, 1 / len(terms))
    parts = np.divide(terms, total, out=even, where=total > 0)
    shares: Array = -weight * joint_penalty(norms, statistics) * parts
    return shares


def far_off_shares(norms: Array, statistics: JointStatistics, weight: float) -> Array:
    """Shares `[L, N]` of the blocks in `far_off`: the one with the largest term has all of it."""
    shares = np.zeros_like(norms)
    most = joint_terms(norms, statistics).argmax(axis=0)
    shares[most, np.arange(norms.shape[1])] = -weight * far_off(norms, statistics)
    return shares


def joint_terms(norms: Array, statistics: JointStatistics) -> Array:
    """Terms `[L, N]` of the squared joint distance u' P u: that of block l is u_l (P u)_l.

    u are the standardised log norms, P their precision.
    """
    u = standardised_logs(norms, statistics)
    terms: Array = u * (statistics.precision @ u)
    return terms
