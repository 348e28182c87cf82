"""Bootstrap intervals for the difference of two methods on the same images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import DataError

VALUES = 2**23  # counts in memory at a time


class Confidences(NamedTuple):
    """Confidences of one method: of ID images `[N]`, and of each OOD data set `[M]`."""

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
    sizes, others = ([len(np.asarray(c)) for c in (m.known, *m.unknown)] for m in (ours, other))
    if sizes != others or len(sizes) < 2 or min(sizes) == 0:
        raise DataError(
            "both methods need confidences of the same ID and OOD images, at least one of each, "
            f"got {sizes} and {others} images"
        )
    generator = np.random.default_rng(seed)
    differences = []
    step = max(VALUES // (sizes[0] + max(sizes[1:])), 1)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        known = _counts(generator, count, sizes[0])
        gain = np.zeros(count)
        for a, b, size in zip(ours.unknown, other.unknown, sizes[1:], strict=True):
            unknown = _counts(generator, count, size)
            gain += _aurocs(ours.known, a, known, unknown)
            gain -= _aurocs(other.known, b, known, unknown)
        differences.append(gain / len(ours.unknown))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(differences), [tail, 100 - tail])
    return float(low), float(high)


def _counts(generator: np.random.Generator, draws: int, images: int) -> NDArray[np.int64]:
    """How often each of `N` images is in each sample of `N` with replacement: `[draws, N]`."""
    drawn = generator.integers(images, size=(draws, images)) + images * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * images).reshape(draws, images)


def _aurocs(
    known: ArrayLike, unknown: ArrayLike, n: NDArray[np.int64], m: NDArray[np.int64]
) -> NDArray[np.float64]:
    """AUROC of every sample `[draws]`, given how often each image is in it; ties count one half."""
    conf = np.concatenate([np.asarray(known), np.asarray(unknown)])
    order = np.argsort(conf)
    _, first = np.unique(conf[order], return_index=True)

    def per_level(counts: NDArray[np.int64], before: int) -> NDArray[np.int64]:
        """How many images of each sample have each value `[draws, V]`."""
        padded = np.pad(counts, ((0, 0), (before, len(conf) - before - counts.shape[1])))
        return np.add.reduceat(padded[:, order], first, axis=1)

    ours, others = per_level(n, 0), per_level(m, n.shape[1])
    below = np.cumsum(others, axis=1) - others / 2
    aurocs: NDArray[np.float64] = (below * ours).sum(axis=1) / (n.sum(axis=1) * m.sum(axis=1))
    return aurocs
