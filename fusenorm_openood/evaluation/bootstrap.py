"""Bootstrap intervals for the difference of two methods on the same images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import DataError

VALUES = 2**23  # counts that are held at a time


class Confidences(NamedTuple):
    """Confidences of one method, larger = more in-distribution.

    Attributes:
        known: of ID images `[N]`.
        unknown: of the images of each OOD data set, `[M]` each.
    """

    known: ArrayLike
    unknown: Sequence[ArrayLike]


def difference_interval(
    ours: Confidences, other: Confidences, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the difference of two methods' mean AUROC over OOD data sets.

    ID images and the images of each OOD data set are drawn with replacement, the same for both
    methods.

    Args:
        ours, other: confidences of the same images in the same order.
        level: probability of the interval.
        draws: number of bootstrap samples.
        seed: seed of the draws.

    Returns:
        Lower and upper end, as a difference of AUROCs in [0, 1].

    Raises:
        DataError: no images, or different numbers of images.
    """
    sizes = [_sizes(confidences) for confidences in (ours, other)]
    if sizes[0] != sizes[1] or len(sizes[0]) < 2 or min(sizes[0]) == 0:
        raise DataError(
            "both methods need confidences of the same ID and OOD images, at least one of each, "
            f"got {sizes[0]} and {sizes[1]} images"
        )
    generator = np.random.default_rng(seed)
    differences = []
    largest = sizes[0][0] + max(sizes[0][1:])
    for start in range(0, draws, step := max(VALUES // largest, 1)):
        count = min(step, draws - start)
        known = _counts(generator, count, sizes[0][0])
        gain = np.zeros(count)
        for a, b in zip(ours.unknown, other.unknown, strict=True):
            unknown = _counts(generator, count, len(np.asarray(a)))
            gain += _aurocs(ours.known, a, known, unknown)
            gain -= _aurocs(other.known, b, known, unknown)
        differences.append(gain / len(ours.unknown))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(differences), [tail, 100 - tail])
    return float(low), float(high)


def _sizes(confidences: Confidences) -> list[int]:
    return [len(np.asarray(c)) for c in (confidences.known, *confidences.unknown)]


def _counts(generator: np.random.Generator, draws: int, images: int) -> NDArray[np.int64]:
    """How often each of `N` images is in each sample of `N` with replacement: `[draws, N]`."""
    drawn = generator.integers(images, size=(draws, images)) + images * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * images).reshape(draws, images)


def _aurocs(
    known: ArrayLike, unknown: ArrayLike, n: NDArray[np.int64], m: NDArray[np.int64]
) -> NDArray[np.float64]:
    """AUROC of every sample `[draws]`, given how often each image is in it; ties count one half."""
    known, unknown = np.asarray(known), np.asarray(unknown)
    values, level = np.unique(np.concatenate([known, unknown]), return_inverse=True)
    if len(values) == len(level):  # no ties: the order of the images is that of the levels
        order = np.argsort(np.concatenate([known, unknown]))
        is_known = order < len(known)
        below = np.cumsum(np.where(is_known, 0, m[:, np.maximum(order - len(known), 0)]), axis=1)
        wins = (below * np.where(is_known, n[:, np.minimum(order, len(known) - 1)], 0)).sum(axis=1)
    else:
        at_known, at_unknown = level[: len(known)], level[len(known) :]
        wins = np.empty(len(n))
        for draw, (one, other) in enumerate(zip(n, m, strict=True)):
            lost = np.bincount(at_unknown, other, len(values))
            below = np.cumsum(lost) - lost / 2
            wins[draw] = below[at_known] @ one
    aurocs: NDArray[np.float64] = wins / (n.sum(axis=1) * m.sum(axis=1))
    return aurocs
