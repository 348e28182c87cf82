"""The joint distance of an image's feature norms from those of ID images."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fusenorm_openood.errors import DataError, ZeroRangeError
from fusenorm_openood.method.statistics import ROUNDING

RIDGE = 1e-3  # added to the diagonal of the correlation matrix
SMALLEST = float(np.finfo(np.float32).tiny)  # the norm of a dead feature map counts as this
LEAST = 1e-6  # the smallest distance, so that its logarithm is finite
FAR = 2.5  # deviations of the log distance above its ID mean from where on an image is far off,
RARE = 99.9  # unless this percentile of the ID images is farther
STEEP = 16.0  # growth of `JointDistance.far_off` per deviation
SLOPE = 0.8  # growth of `JointDistance.penalty` per deviation of what is far off, times the cap


class JointStatistics(NamedTuple):
    """Statistics of the log norms of `L` layers on ID images."""

    mean: NDArray[np.float64]  # `[L]`
    scale: NDArray[np.float64]  # standard deviations `[L]`, infinite where a norm is constant
    precision: NDArray[np.float64]  # inverse `[L, L]` of their correlation matrix with its ridge
    # Of the log joint distance on the ID images, each left out of what it is compared with: mean,
    # standard deviation, and beyond which an image is far off.
    log_mean: float
    log_std: float
    limit: float = math.inf


def sum_of_rows(rows: Tensor) -> Tensor:
    """The sum over the first axis, one row after another.

    Unlike the last bit of a reduction or a matrix product, that of this sum does not depend on the
    number of images, so that an image has one confidence in every batch.
    """
    if torch.compiler.is_compiling():
        return rows.sum(0)
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


class JointDistance(nn.Module):
    """log M of feature norms `[L, N]`, and the penalties that follow from it.

    With u the standardised log norms and C their correlation, M = sqrt(u' C^-1 u / L) is the
    Mahalanobis distance of the log norms from their ID mean. All values are float64.
    """

    mean: Tensor
    inverse: Tensor
    precision: Tensor

    def __init__(self, statistics: JointStatistics) -> None:
        super().__init__()
        self.log_mean, self.log_std = statistics.log_mean, statistics.log_std
        self.limit = statistics.limit
        self.varying = int(np.count_nonzero(np.isfinite(statistics.scale)))
        self.statistics = statistics
        inverse = 1 / statistics.scale  # 0 for a constant layer
        constants = {"mean": statistics.mean, "inverse": inverse, "precision": statistics.precision}
        for name, array in constants.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float64, device="cpu"))

    def of_layers(self, layers: Sequence[int]) -> "JointDistance":
        """The distance of the norms of some layers alone, which is at most that of all.

        Their correlation is a block of that of all, so that u' C^-1 u loses what the other layers
        add to it given these, which is no less than 0 (Schur complement).
        """
        rows, s = list(layers), self.statistics
        block = np.linalg.inv(s.precision)[np.ix_(rows, rows)]
        part = s._replace(mean=s.mean[rows], scale=s.scale[rows], precision=np.linalg.inv(block))
        distance = JointDistance(part)
        distance.varying = self.varying
        return distance

    def standardised(self, norms: Tensor) -> Tensor:
        """u `[L, N]`: log norms with mean 0 and deviation 1 on ID images; 0 for constant ones."""
        return (norms.clamp(min=SMALLEST).log() - self.mean[:, None]) * self.inverse[:, None]

    def terms(self, norms: Tensor) -> Tensor:
        """Terms `[L, N]` of u' C^-1 u: that of layer l is u_l (C^-1 u)_l."""
        u = self.standardised(norms)
        if torch.compiler.is_compiling():
            return u * (self.precision @ u)
        product = torch.zeros_like(u)
        for weights, row in zip(self.precision.T, u, strict=True):  # see `sum_of_rows`
            product = product + weights[:, None] * row
        return u * product

    def log_distance(self, terms: Tensor) -> Tensor:
        """log M `[N]` from its terms, larger = less in-distribution."""
        squared = sum_of_rows(terms) / self.varying
        return squared.clamp(min=0).sqrt().clamp(min=LEAST).log()

    def far_off(self, terms: Tensor) -> Tensor:
        """How far images are beyond the limit of ID images, >= 0: `[N]`.

        16 max(0, log M - limit) / log_std. The limit is 2.5 standard deviations above the mean of
        log M on the ID images, each left out of the statistics that it is compared with, or farther
        if more than one in a thousand of them is.
        """
        return STEEP * (self.log_distance(terms) - self.limit).clamp(min=0) / self.log_std

    def penalty(self, terms: Tensor, margin: float, cap: float) -> Tensor:
        """min(cap, exp(t - margin)) of log M, standardised on ID images to t: `[N]`.

        What is far off, beyond both the limit and the margin, adds 0.8 cap per standard deviation.
        """
        t = (self.log_distance(terms) - self.log_mean) / self.log_std
        limit = math.log(cap) if cap else -math.inf  # beyond which powers could overflow
        far = max(margin, (self.limit - self.log_mean) / self.log_std)
        return (t - margin).clamp(max=limit).exp() + SLOPE * cap * (t - far).clamp(min=0)


def joint_statistics(norms: ArrayLike, names: Sequence[str] | None = None) -> JointStatistics:
    """Statistics of the feature norms `[L, N]` of ID images; see `JointDistance`.

    A layer whose norm is constant on the ID images, such as a dead one, is left out with a
    RuntimeWarning. DataError for norms that are not `[L, N]`, or no images; ZeroRangeError if no
    norm varies.
    """
    v = np.log(np.maximum(np.asarray(norms, dtype=np.float64), SMALLEST))
    if v.ndim != 2 or v.shape[1] == 0:
        raise DataError(
            f"ID norms must be [layers, images] with at least one image, got shape {v.shape}"
        )
    mean, std = v.mean(axis=1), v.std(axis=1)
    varies = std > ROUNDING * np.maximum(1, abs(mean))
    labels = [f"layer {i}" for i in range(len(v))] if names is None else list(names)
    constant = [name for name, is_live in zip(labels, varies, strict=True) if not is_live]
    if not varies.any():
        raise ZeroRangeError(
            f"the norms of all {len(v)} layers are constant on the ID images: fit on more and more "
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
    distance = JointDistance(first)
    terms = distance.terms(torch.from_numpy(np.asarray(norms, dtype=np.float64)))
    log_m = distance.log_distance(terms).numpy()
    # Few images fill the space that they span: each left out, by its leverage, is farther away.
    leverage = (np.count_nonzero(varies) * np.exp(2 * log_m) + 1) / v.shape[1]
    left_out = log_m - np.log(np.maximum(1 - leverage, LEAST))
    usual = np.percentile(left_out, RARE, method="lower")  # not the farthest of few images
    log_mean, log_std = float(left_out.mean()), float(left_out.std()) + 1e-8
    limit = max(log_mean + FAR * log_std, float(usual))
    return first._replace(log_mean=log_mean, log_std=log_std, limit=limit)
