"""ID statistics of each expert, the normalisation of scores by them, and the trust in a fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import DataError, NonFiniteError, ZeroRangeError
from fusenorm_openood.method.validation import check_percentiles

# Networks compute in float32: a range this small relative to the scores is rounding error.
ROUNDING = 8 * float(np.finfo(np.float32).eps)
EQUAL = 1e-5  # of the usual score: what differs by less is equal


@dataclass(frozen=True)
class IDStatistics:
    """Statistics of each expert's scores on ID images, each array `[L]`."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def compute_id_statistics(
    scores: ArrayLike,
    percentile_low: float = 1.0,
    percentile_high: float = 99.9,
    names: Sequence[str] | None = None,
    scale: ArrayLike = 0.0,
    clip: bool = False,
) -> IDStatistics:
    """Mean, standard deviation and two percentiles of each expert's ID scores.

    Args:
        scores: ID scores `[L, N]`, one row per expert, larger = more in-distribution.
        percentile_low: percentile in [0, 100] that is mapped to 0.
        percentile_high: percentile in [0, 100] that is mapped to 1.
        names: the experts' names `[L]`, for error messages.
        scale: size `[L]` of the values that each expert's scores are computed from, as far as it
            is known: their rounding is no range.
        clip: whether scores count as at most the upper percentile in mean and standard deviation.

    Raises:
        ConfigError: percentiles out of order or outside [0, 100].
        DataError: scores that are not `[L, N]`, or no images.
        NonFiniteError: NaN or infinity among the scores.
        ZeroRangeError: an expert whose two percentiles are equal up to float32 rounding.

    Source: `compute_id_statistics` in the FuseNorm repository.

    Examples:
        >>> statistics = compute_id_statistics([range(101)], 1, 99)
        >>> statistics.mean, statistics.upper
        (array([50.]), array([99.]))
    """
    check_percentiles(percentile_low, percentile_high)
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or s.shape[1] == 0:
        raise DataError(
            f"ID scores must be [experts, images] with at least one image, got shape {s.shape}"
        )
    labels = [f"expert {i}" for i in range(len(s))] if names is None else list(names)
    for name, row in zip(labels, s, strict=True):
        if not np.isfinite(row).all():
            raise NonFiniteError(
                f"ID scores of {name!r} must be finite, got NaN or infinity for "
                f"{np.count_nonzero(~np.isfinite(row))} images: look for NaN in the ID images or "
                "the network's weights"
            )
    lower, upper = np.percentile(s, [percentile_low, percentile_high], axis=1)
    size = np.maximum(np.broadcast_to(scale, lower.shape), np.maximum(abs(lower), abs(upper)))
    for name, low, high, rounded in zip(labels, lower, upper, ROUNDING * size, strict=True):
        if not high - low > rounded:
            both = f"{low:.6g}{' up to rounding' if low != high else ''}"
            raise ZeroRangeError(
                f"percentiles {percentile_low} and {percentile_high} of the ID scores of {name!r} "
                f"are both {both}: check that the network has its weights, leave this expert out, "
                "or fit on more and more varied images"
            )
    s = np.minimum(s, upper[:, None]) if clip else s
    return IDStatistics(s.mean(axis=1), s.std(axis=1) + 1e-8, lower, upper)


def normalise(scores: ArrayLike, statistics: IDStatistics) -> NDArray[np.float64]:
    """z = (s - lower) / (upper - lower) for scores `[L, N]`: ID scores fill the unit interval.

    Raises:
        DataError: scores that are not `[L, N]` with one row per expert of the statistics.

    Examples:
        >>> normalise([[1, 50, 148]], compute_id_statistics([range(101)], 1, 99))
        array([[0. , 0.5, 1.5]])
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or len(s) != len(statistics.lower):
        raise DataError(
            f"scores must be [experts, images] with {len(statistics.lower)} experts, as in the "
            f"ID statistics, got shape {s.shape}"
        )
    lower, upper = statistics.lower[:, None], statistics.upper[:, None]
    return (s - lower) / (upper - lower)


def trust(left_out: ArrayLike, in_sample: ArrayLike, shrinkage: float = 0.0) -> float:
    """Rank correlation of scores of ID images, left out of the fit and in it, times 1 - shrinkage.

    Spearman's correlation, at least 0, is 1 if an image's own part in the fit does not change which
    images score high, as with many images per class and dimension, and 0 for what has learnt its
    images by heart, like class means of one image each. Scores that are all equal, up to rounding,
    correlate with none. The shrinkage in [0, 1] is the share of a covariance that was assumed.

    >>> ids = [1.0, 2.0, 3.0]
    >>> trust(ids, [0.1, 0.2, 0.5]), trust(ids, [0.0, 0.0, 0.0]), trust(ids, ids, shrinkage=0.25)
    (1.0, 0.0, 0.75)
    """
    step = EQUAL * float(np.median(np.abs(left_out))) or 1.0
    a, b = (_ranks(np.round(np.asarray(s, np.float64) / step)) for s in (left_out, in_sample))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((1 - shrinkage) * (a @ b) / spread, 0, 1).round(12)) if spread else 0.0


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks `[N]` less their mean; equal scores have the mean of theirs."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    found: NDArray[np.float64] = ranks - ranks.mean()
    return found
