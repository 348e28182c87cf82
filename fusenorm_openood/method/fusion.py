"""Fuse strong and weak experts into one confidence."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import ConfigError, DataError, number, numbers


def deviation(z: ArrayLike) -> NDArray[np.float64]:
    """d = max(0, -z, z - 1): the distance of a normalised score from the unit interval."""
    z = np.asarray(z, dtype=np.float64)
    d: NDArray[np.float64] = np.maximum(0.0, np.maximum(-z, z - 1.0))
    return d


def penalty(weak: ArrayLike, base: float = 20.0, cap: float = 1.0) -> NDArray[np.float64]:
    """min(cap, base^D - 1) with D the largest deviation among the weak experts.

    Args:
        weak: normalised scores of the weak experts `[W, N]`; W may be 0.
        base: how steeply the penalty grows, >= 1.
        cap: the largest penalty, >= 0.

    Returns:
        Penalties `[N]` in [0, cap], larger = less in-distribution.
    """
    check_penalty(base, cap)
    d = deviation(weak).max(axis=0, initial=0.0)
    limit = np.log1p(cap) / np.log(base) if base > 1 else np.inf  # base^limit - 1 = cap
    grown: NDArray[np.float64] = np.expm1(np.minimum(d, limit) * np.log(base))
    return np.minimum(cap, grown)


def fuse(
    strong: ArrayLike,
    weak: ArrayLike,
    weights: Sequence[float] | None = None,
    base: float = 20.0,
    cap: float = 1.0,
) -> NDArray[np.float64]:
    """Weighted mean of the strong experts minus the penalty of the weak ones.

    Args:
        strong: normalised scores `[S, N]` of the experts that carry the decision, S >= 1.
        weak: normalised scores `[W, N]` of the experts that can only lower it; W may be 0.
        weights: one weight >= 0 per strong expert, scaled to sum to 1; None = equal weights.
        base: see `penalty`.
        cap: see `penalty`.

    Returns:
        Confidences `[N]`, larger = more in-distribution.

    Raises:
        ConfigError: invalid weights, base or cap.
        DataError: scores that are not `[experts, N]` with the same N.

    Source: `fuse_norm` in the FuseNorm repository (equal weights, base 20, cap 1).
    """
    strong, weak = (np.asarray(z, dtype=np.float64) for z in (strong, weak))
    if strong.ndim != 2 or weak.ndim != 2 or len(strong) == 0 or strong.shape[1] != weak.shape[1]:
        raise DataError(
            "strong and weak scores must be [experts, images] for the same images, with at least "
            f"one strong expert, got shapes {strong.shape} and {weak.shape}"
        )
    return mean_of_strong(strong, weights) - penalty(weak, base, cap)


def mean_of_strong(
    strong: NDArray[np.float64], weights: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """Weighted mean `[N]` of the scores `[S, N]` of the strong experts; None = equal weights."""
    mean: NDArray[np.float64] = check_weights(weights, len(strong)) @ strong
    return mean


def check_weights(weights: Sequence[float] | None, count: int) -> NDArray[np.float64]:
    """The weights of `count` strong experts, scaled to sum to 1; ConfigError if invalid."""
    given = (1.0,) * count if weights is None else numbers(weights)
    w = np.array(() if given is None else given, dtype=np.float64)
    if w.shape != (count,) or (w < 0).any() or not 0 < w.sum() < np.inf:
        raise ConfigError(
            f"weights must be one number >= 0 for each of the {count} strong experts, not all 0, "
            f"got {weights}"
        )
    scaled: NDArray[np.float64] = w / w.sum()
    return scaled


def check_penalty(base: float, cap: float) -> None:
    """Raise ConfigError unless base >= 1 and cap >= 0, both finite."""
    if number(base) is None or number(cap) is None or base < 1 or cap < 0:
        raise ConfigError(
            f"base must be >= 1 and cap >= 0, both finite, got base={base} and cap={cap}"
        )
