"""How far an expert that was fitted on ID images can be trusted, from these images alone."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-5  # of the usual score: what differs by less is equal


def trust(left_out: ArrayLike, in_sample: ArrayLike) -> float:
    """Rank correlation of scores of ID images, left out of the fit and in it; at least 0.

    Spearman's. It is 1 if an image's own part in the fit does not change which images score high,
    as with many images per class and dimension, and 0 for what has learnt its images by heart, like
    class means of one image each. Scores that are all equal, up to rounding, correlate with none.

    Args:
        left_out: scores `[N]` of ID images, each left out of the fit.
        in_sample: scores of the same images in the fit.

    Returns:
        A weight in [0, 1].

    >>> trust([1.0, 2.0, 3.0], [0.1, 0.2, 0.5]), trust([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    (1.0, 0.0)
    """
    step = ROUNDING * float(np.median(np.abs(left_out))) or 1.0
    a, b = (_ranks(np.round(np.asarray(s, np.float64) / step)) for s in (left_out, in_sample))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / spread, 0, 1).round(12)) if spread else 0.0


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks `[N]` less their mean; equal scores have the mean of theirs."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks - ranks.mean()
