"""The joint distance of an image's block norms from those of ID images."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import DataError, ZeroRangeError
from fusenorm_openood.method.statistics import ROUNDING

RIDGE = 1e-3  # added to the diagonal of the correlation matrix
SMALLEST = float(np.finfo(np.float32).tiny)  # the norm of a dead feature map counts as this
LEAST = 1e-6  # the smallest distance, so that its logarithm is finite
FAR = 2.5  # deviations of the log distance above its ID mean from where on an image is far off,
RARE = 99.9  # unless this percentile of the ID images is farther
STEEP = 16.0  # growth of `far_off` per deviation


class JointStatistics(NamedTuple):
    """Statistics of the log norms of `L` blocks on ID images.

    Attributes:
        mean: means `[L]`.
        scale: standard deviations `[L]`, infinite for a block whose norm is constant.
        precision: inverse `[L, L]` of their correlation matrix with its ridge.
        log_mean: mean of the log joint distance on the ID images.
        log_std: its standard deviation.
        limit: the log joint distance beyond which an image is far off; see `far_off`.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    precision: NDArray[np.float64]
    log_mean: float
    log_std: float
    limit: float = math.inf


def joint_statistics(norms: ArrayLike, names: Sequence[str] | None = None) -> JointStatistics:
    """Statistics of the block norms `[L, N]` of ID images; see `log_joint_distance`.

    A block whose norm is constant on the ID images, such as a dead one, is left out with a
    RuntimeWarning.

    Raises:
        DataError: norms that are not `[L, N]`, or no images.
        ZeroRangeError: no block's norm varies.
    """
    v = _log(norms)
    if v.ndim != 2 or v.shape[1] == 0:
        raise DataError(
            f"ID norms must be [blocks, images] with at least one image, got shape {v.shape}"
        )
    mean, std = v.mean(axis=1), v.std(axis=1)
    varies = std > ROUNDING * np.maximum(1, abs(mean))
    labels = [f"block {i}" for i in range(len(v))] if names is None else list(names)
    constant = [name for name, is_live in zip(labels, varies, strict=True) if not is_live]
    if not varies.any():
        raise ZeroRangeError(
            f"the norms of all {len(v)} blocks are constant on the ID images: fit on more and more "
            "varied images"
        )
    if constant:
        warnings.warn(
            f"left out of the joint distance, constant on the ID images: {', '.join(constant)}",
            RuntimeWarning,
            stacklevel=2,
        )
    scale = np.where(varies, std, np.inf)
    u = (v - mean[:, None]) / scale[:, None]
    correlation = u @ u.T / v.shape[1] + RIDGE * np.eye(len(v))
    correlation[~varies, ~varies] = 1  # their u is 0
    first = JointStatistics(mean, scale, np.linalg.inv(correlation), 0.0, 1.0)
    log_m = log_joint_distance(norms, first)
    # Few images fill the space that they span: each left out, by its leverage, is farther away.
    leverage = (np.count_nonzero(varies) * np.exp(2 * log_m) + 1) / v.shape[1]
    left_out = log_m - np.log(np.maximum(1 - leverage, LEAST))
    usual = np.percentile(left_out, RARE, method="lower")  # not the farthest of few images
    limit = float(max(left_out.mean() + FAR * left_out.std(), usual))
    return first._replace(
        log_mean=float(log_m.mean()), log_std=float(log_m.std()) + 1e-8, limit=limit
    )


def log_joint_distance(norms: ArrayLike, statistics: JointStatistics) -> NDArray[np.float64]:
    """log M of block norms `[L, N]` -> `[N]`, larger = less in-distribution.

    With u the standardised log norms and C their correlation, M = sqrt(u' C^-1 u / L): the
    Mahalanobis distance of the log norms from their ID mean.
    """
    u = standardised_logs(norms, statistics)
    blocks = np.count_nonzero(np.isfinite(statistics.scale))
    squared = np.einsum("ln,lk,kn->n", u, statistics.precision, u) / blocks
    log_m: NDArray[np.float64] = np.log(np.maximum(np.sqrt(np.maximum(squared, 0)), LEAST))
    return log_m


def standardised_logs(norms: ArrayLike, statistics: JointStatistics) -> NDArray[np.float64]:
    """u `[L, N]`: the log norms with mean 0 and deviation 1 on ID images; 0 for constant ones."""
    u: NDArray[np.float64] = (_log(norms) - statistics.mean[:, None]) / statistics.scale[:, None]
    return u


def joint_penalty(norms: ArrayLike, statistics: JointStatistics) -> NDArray[np.float64]:
    """Penalties `[N]` of block norms `[L, N]`, larger = less in-distribution.

    log M, standardised by its mean and deviation on ID images, and `far_off` on top.
    """
    log_m = log_joint_distance(norms, statistics)
    standardised: NDArray[np.float64] = (log_m - statistics.log_mean) / statistics.log_std
    return standardised + far_off(norms, statistics)


def far_off(norms: ArrayLike, statistics: JointStatistics) -> NDArray[np.float64]:
    """How far beyond the limit of ID images block norms `[L, N]` are, >= 0: `[N]`.

    16 max(0, log M - limit) / log_std. The limit is 2.5 standard deviations above the mean of
    log M on the ID images, each left out of the statistics that it is compared with, or farther
    if more than one in a thousand of them is.
    """
    beyond = np.maximum(log_joint_distance(norms, statistics) - statistics.limit, 0)
    grown: NDArray[np.float64] = STEEP * beyond / statistics.log_std
    return grown


def _log(norms: ArrayLike) -> NDArray[np.float64]:
    return np.log(np.maximum(np.asarray(norms, dtype=np.float64), SMALLEST))
