"""From confidences to verdicts whose error rate on ID images is known: conformal p-values.

Source: Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics 2023.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import CalibrationError, NonFiniteError
from fusenorm_openood.method.validation import SHARE

EQUAL = 1e-12  # 1 - 0.9 is 0.09999999999999998: what differs by less counts as equal


def conformal_p_values(conf: ArrayLike, calibration: ArrayLike) -> NDArray[np.float64]:
    """p = (1 + number of calibration confidences `[n]` <= conf) / (n + 1), of the shape of conf.

    For an ID image that is exchangeable with the calibration images, P(p <= a) <= a for every a in
    [0, 1], whatever the distribution of the confidences; ties make p larger. They are in
    [1 / (n + 1), 1], larger = more in-distribution. NonFiniteError for other confidences.
    """
    conf, calibration = np.asarray(conf, np.float64), np.asarray(calibration, np.float64)
    for what, values in (("conf", conf), ("calibration", calibration)):
        if not np.isfinite(values).all():
            raise NonFiniteError(f"{what} must be finite, got NaN or infinity: check the images")
    smaller = np.searchsorted(np.sort(calibration), conf, side="right")
    p: NDArray[np.float64] = (1 + smaller) / (len(calibration) + 1)
    return p


def rejects(p: ArrayLike, acceptance: float) -> NDArray[np.bool_]:
    """Whether p <= 1 - acceptance: the images that are judged OOD."""
    rejected: NDArray[np.bool_] = np.asarray(p) <= _error(acceptance)
    return rejected


def max_rank(acceptance: float, n: int) -> int:
    """The largest rank, 1 + the number of calibration scores <= conf, with which an image is OOD.

    So p = rank / (n + 1) <= 1 - acceptance, in integers.

    >>> [max_rank(acceptance, 39) for acceptance in (0.95, 0.9, 0.5)]
    [2, 4, 20]

    CalibrationError for too few calibration images, ConfigError for an acceptance outside (0, 1).
    """
    check_enough(n, acceptance)
    return math.floor(_error(acceptance) * (n + 1))


def threshold(scores: Sequence[float] | NDArray[np.float64], acceptance: float) -> float:
    """The smallest confidence that is accepted, among sorted calibration scores `[n]`.

    A confidence is below it if and only if its rank is at most `max_rank`. Errors as there.

    >>> threshold(range(39), 0.95)
    1.0
    """
    return float(scores[max_rank(acceptance, len(scores)) - 1])


def needed_images(acceptance: float) -> int:
    """The smallest number of calibration images with which an image can be rejected.

    >>> needed_images(0.95), needed_images(0.9), needed_images(0.999)
    (19, 9, 999)
    """
    return max(math.ceil(1 / _error(acceptance)) - 1, 1)


def check_enough(n: int, acceptance: float, of: str = "") -> None:
    """Raise CalibrationError unless n calibration images, `of` a group, suffice."""
    needed = needed_images(acceptance)
    if n < needed:
        raise CalibrationError(
            f"acceptance={acceptance:g} needs at least {needed} calibration images, got {n}{of}: "
            "calibrate on more, or choose a smaller acceptance"
        )


def _error(acceptance: float) -> float:
    """The share of ID images that may be rejected; ConfigError for an acceptance outside (0, 1)."""
    share: float = SHARE("acceptance", acceptance)
    return 1 - share + EQUAL


@dataclass(frozen=True)
class Guarantee:
    """What holds for the share of ID images that are accepted at an acceptance.

    Attributes:
        acceptance: the acceptance that was asked for.
        images: number of calibration images.
        confidence: probability with which the intervals hold, over calibration sets.
        average: expected share over calibration sets and test images: at least this with ties,
            exactly this without.
        low: lower end of the central interval of the share with this calibration set, by the
            Beta distribution; with ties the share may only be larger.
        high: its upper end, without ties.
        uniform: largest distance between the share and any acceptance, all at once, by the
            Dvoretzky-Kiefer-Wolfowitz inequality: what holds for an acceptance that is picked
            after the calibration images were looked at.
        of: what the share is of.
    """

    acceptance: float
    images: int
    confidence: float
    average: float
    low: float
    high: float
    uniform: float
    of: str = "ID images"

    def __str__(self) -> str:
        return (
            f"of {self.of} like the {self.images} calibration images, {self.average:.1%} are "
            f"accepted on average; with probability {self.confidence:.0%} it is between "
            f"{self.low:.1%} and {self.high:.1%} with these calibration images, and within "
            f"{self.uniform:.1%} of any acceptance picked afterwards"
        )


def guarantee(n: int, acceptance: float, confidence: float = 0.95) -> Guarantee:
    """What n calibration images promise at an acceptance; see `Guarantee`.

    With k = `max_rank`, the share of accepted ID images has the distribution Beta(n + 1 - k, k)
    over calibration sets. Errors as there.
    """
    confidence = SHARE("confidence", confidence)
    acceptance = SHARE("acceptance", acceptance)
    from scipy import stats  # takes longer to import than the rest of the package

    k = max_rank(acceptance, n)
    share = stats.beta(n + 1 - k, k)
    low, high = share.interval(confidence)
    uniform = math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))
    return Guarantee(
        acceptance, n, confidence, float(share.mean()), float(low), float(high), uniform
    )


def rejects_at_fdr(p: ArrayLike, rate: float = 0.1) -> NDArray[np.bool_]:
    """Which of many images are OOD, with an expected share of at most `rate` ID images among them.

    The procedure of Benjamini and Hochberg. Conformal p-values that share their calibration images
    depend on each other positively, under which it keeps its promise (Bates et al., Theorem 2).
    ConfigError for a rate outside (0, 1).
    """
    rate = SHARE("rate", rate)
    p = np.asarray(p, np.float64)
    if p.size == 0:
        return np.zeros(0, np.bool_)
    from scipy import stats

    rejected: NDArray[np.bool_] = stats.false_discovery_control(p) <= rate + EQUAL
    return rejected


def fewest_rejections(n: int, tested: int, rate: float) -> int:
    """The smallest number of images that n calibration images can reject of those `tested`.

    No p-value is below 1 / (n + 1), and `rejects_at_fdr` needs as many of this size.

    >>> fewest_rejections(99, 1000, 0.05), fewest_rejections(9999, 1000, 0.05)
    (200, 2)
    """
    rate = float(SHARE("rate", rate))
    return math.ceil(tested / ((n + 1) * (rate + EQUAL)))
