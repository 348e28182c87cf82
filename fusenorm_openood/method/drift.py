"""Whether confidences still come from where the calibration images came from: a test for streams.

p-values that compare each image with the same calibration images are not enough. Given those
images they are uniform only up to 1 / sqrt(n), so that a test on them ends in a false alarm on
every long stream. Here each confidence is ranked among the calibration scores *and* the stream
before it: as long as all are exchangeable, these p-values are independent and exactly uniform.

Sources: Vovk, Nouretdinov and Gammerman, "Testing exchangeability on-line", ICML 2003; Vovk et al.,
"Retrain or not retrain: conformal test martingales for change-point detection", COPA 2021;
Shin, Ramdas and Rinaldo, "E-detectors", NEJSDS 2024 (start times); Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS-B 2024 (bounds of a rate).
"""

from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

KEPT = 10_000  # scores that a new one is ranked among
NOTHING = -1e18  # the logarithm of a capital of 0, finite for JSON

# Bets that the normal score of p has mean d and deviation s, where without drift it has 0 and 1;
# each for (almost) all images and for a tenth of them.
_MEANS = np.array([-2, -1, -0.5, -0.25, 0.25, 0.5, 1, 2, 0, 0] * 2)
_DEVIATIONS = np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 0.5] * 2)
_SHARES = np.repeat([0.99, 0.1], 10)
SHIFTS = [
    "lower" if d < 0 else "higher" if d > 0 else "wider" if s > 1 else "narrower"
    for d, s in zip(_MEANS, _DEVIATIONS, strict=True)
]  # what each bet is on
_TILTS = 2.0 ** np.arange(-12, 4)


def online_p_values(
    conf: NDArray[np.float64],
    scores: list[float],
    random: NDArray[np.float64],
    most: int = KEPT,
) -> tuple[NDArray[np.float64], list[float]]:
    """p = (scores below + a random share of 1 + those that are equal) / (n + 1), one by one.

    Each confidence joins the scores. Where they are then more than `most`, one of them, drawn from
    all with equal probability, leaves. Which of these scores was the new one is independent of
    what stays, so that the p-values stay independent and uniform, unlike with the newest `most`.

    From finite confidences `[N]` in their order, the sorted scores before, and uniform numbers
    `[N, 2]` in [0, 1): p-values `[N]` in [0, 1), low = low confidence; the scores after.
    """
    scores, p = list(scores), np.empty(len(conf))
    for row, (score, (tie, leaves)) in enumerate(zip(conf.tolist(), random.tolist(), strict=True)):
        low = bisect_left(scores, score)
        high = bisect_right(scores, score, low)
        p[row] = (low + tie * (high - low + 1)) / (len(scores) + 1)
        scores.insert(high, score)
        if len(scores) > most:
            del scores[int(leaves * len(scores))]
    return p, scores


def start() -> NDArray[np.float64]:
    """The logarithms of the capitals `[K]` of all bets before the first row."""
    return np.full(len(_MEANS), NOTHING)


def bet(
    p: NDArray[np.float64], log_capitals: NDArray[np.float64], rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A test martingale: the capital of a gambler who bets that the p-values are not uniform.

    It starts at 1, and for independent uniform p-values it ever reaches c with a probability of at
    most 1 / c (Ville). The bets are on shifts in both directions and of both spreads. Each is begun
    anew at every row t with 1 / log2(t + 1) - 1 / log2(t + 2) of the capital, which is 1 in all: a
    shift is found late in a stream, too, and the probability still holds for all of its rows.

    From p-values `[N]`, the capitals `[K]` of the `rows` before (`start` at first), in logarithms:
    that of the martingale after each row `[N]`, and those of the capitals `[K]`.
    """
    from scipy.special import ndtri

    z = ndtri(np.clip(p, 1e-12, 1 - 1e-12))[:, None]
    ratio = np.exp((z**2 - ((z - _MEANS) / _DEVIATIONS) ** 2) / 2) / _DEVIATIONS
    gains = np.log1p(_SHARES * (ratio - 1)).cumsum(axis=0)
    waiting = 1 / np.log2(2.0 + rows + np.arange(len(p) + 1))  # capital that is not yet at stake
    begun = np.log(waiting[:-1] - waiting[1:])[:, None] - np.vstack([0 * gains[:1], gains[:-1]])
    capitals = np.logaddexp.accumulate(np.vstack([log_capitals, begun]), axis=0)[1:] + gains
    total = np.logaddexp.reduce(capitals, axis=1) - np.log(len(_MEANS))
    return np.logaddexp(total, np.log(waiting[1:])), capitals[-1] if len(p) else log_capitals


def rate_bounds(count: int, rows: int, level: float) -> tuple[float, float]:
    """Bounds of a rate that hold after every row at once, with a probability of 1 - level.

    What is bounded is the mean, over the rows so far, of each row's probability given those before:
    it may change from row to row. A betting confidence sequence: a mixture over tilts of
    exp(tilt * count) / (1 + rate * (exp(tilt) - 1)) ** rows, at the mean because its logarithm is
    concave in the rate.

    >>> [f"{bound:.3f}" for bound in rate_bounds(50, 1000, 0.05)]
    ['0.029', '0.078']
    """
    return _lower(count, rows, level), 1 - _lower(rows - count, rows, level)


def _lower(count: int, rows: int, level: float) -> float:
    """The smallest rate that the mixture does not reject at half the level."""

    def rejected(rate: float) -> bool:
        logs = _TILTS * count - rows * np.log1p(rate * np.expm1(_TILTS))
        capital = np.logaddexp.reduce(logs) - np.log(len(_TILTS))
        return bool(capital >= np.log(2 / level))

    low, high = 0.0, count / max(rows, 1)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low
