"""Adaptive top-k feature norm (ATF): one number for one feature map."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusenorm_openood import kernels
from fusenorm_openood.kernels.devices import with_double
from fusenorm_openood.method.validation import FRACTION, POSITIVE, UNIT, check_order

IN_CACHE = 2**18  # values that a CPU works on at a time


class FeatureNorm(NamedTuple):
    """Settings of one feature norm; see `atf`."""

    k_min: float = 0.1
    k_max: float = 0.25
    alpha: float = 0.0
    eps: float = 1e-8


def atf(
    x: Tensor, k_min: float = 0.1, k_max: float = 0.25, alpha: float = 0.0, eps: float = 1e-8
) -> Tensor:
    """Adaptive top-k feature norm of each feature map in a batch.

    In every channel the norm is the root of the mean of the k largest energies. Channels are
    weighted by how concentrated their energy is in space, and k grows with the mean spatial
    entropy of the sample. A compiled kernel computes it where
    `fusenorm_openood.kernels.backend` has one for the device, else torch, in float64; either
    way the order of the pixels, the batch size and the memory format change nothing but the last
    digits of float32.

    Args:
        x: feature maps ``[B, C, H, W]``, floating point.
        k_min: smallest fraction of pixels to average, in (0, 1].
        k_max: largest fraction of pixels to average, in [k_min, 1].
        alpha: share of the uniform weight 1/C in each channel weight, in [0, 1].
        eps: keeps divisions and logarithms finite; positive.

    Returns:
        Norms ``[B]``, at least 0, larger for feature maps of stronger activation, on the device
        of ``x``: float64 for float64 input, else float32. A feature map that holds NaN or
        infinity has the norm NaN.

    Raises:
        ConfigError: a fraction outside its interval.
        TapError: ``x`` is not a non-empty floating-point batch of feature maps.

    Source: ``adaptive_topk_channel_weight`` in the FuseNorm repository. A map of one pixel has no
    spatial entropy: h = 0 there.

    Examples:
        >>> x = torch.ones(2, 1, 4, 4)
        >>> x[1, 0, 0, 0] = 5
        >>> atf(x)
        tensor([1., 3.])
    """
    low, high = FRACTION("k_min", k_min), FRACTION("k_max", k_max)
    check_order("k_min", low, "k_max", high)
    setting = FeatureNorm(low, high, UNIT("alpha", alpha), POSITIVE("eps", eps))
    return atf_each(x, [setting])[:, 0]


def atf_map(
    x: Tensor, k_min: float = 0.1, k_max: float = 0.25, alpha: float = 0.0, eps: float = 1e-8
) -> Tensor:
    """Heat maps ``[B, H, W]`` in float64, at least 0, that add up to the norms of `atf`.

    The norm's own terms by pixel: a pixel has, summed over the channels in which its energy is one
    of the k largest, e / (k sqrt(mean of these k)) by channel weight.
    """
    a = with_double(x.detach().flatten(2).abs())
    h = _entropy(a, eps)
    w = _channel_weights(h, alpha, eps)
    order = a.sort(dim=-1, descending=True, stable=True)
    k = _adaptive_k(h, x, k_min, k_max)
    energy = order.values.double().square()
    chosen = torch.arange(a.shape[-1], device=a.device) < k
    energy = energy * chosen
    root = (energy.sum(-1, keepdim=True) / k).sqrt()
    terms = w.unsqueeze(-1) * energy / (k * root).clamp(min=torch.finfo(torch.float64).tiny)
    placed = torch.zeros_like(energy).scatter(-1, order.indices, terms)
    return placed.sum(1).view(len(x), *x.shape[2:])


def _by_torch(x: Tensor, settings: Sequence[tuple[float, float, float, float]]) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]`` on any device."""
    x = with_double(x)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _norms(x, settings)
    size = max(IN_CACHE // x.shape[1:].numel(), 1)
    return torch.cat([_norms(part, settings) for part in torch.split(x, size)], dim=1)


def _norms(x: Tensor, settings: Sequence[tuple[float, float, float, float]]) -> Tensor:
    N, a = x.shape[-1], x.abs()
    # h <= 1 bounds k for the whole batch, rounding in float32 included: one selection, and no
    # wait for the device.
    k_bound = min(N, math.floor(max(k_max for _, k_max, *_ in settings) * N * (1 + 2**-20)) + 1)
    top = a.topk(k_bound).values.double().square()
    rank = top.new_ones(k_bound).cumsum(0)
    entropies = {eps: _entropy(a, eps) for eps in dict.fromkeys(eps for *_, eps in settings)}

    norms = []
    for k_min, k_max, alpha, eps in settings:
        h = entropies[eps]
        w = _channel_weights(h, alpha, eps)
        k = _adaptive_k(h, x, k_min, k_max).clamp(max=k_bound)  # if h is NaN
        mean = (top * (rank <= k)).sum(-1) / k.squeeze(-1)
        norms.append((w * mean.sqrt()).sum(-1))
    return torch.stack(norms)


def _channel_weights(h: Tensor, alpha: float, eps: float) -> Tensor:
    """Weights ``[B, C]`` of the channels, larger for energy that is concentrated in space."""
    w = (1 - h) / eps  # in units of eps, which is then no constant that a runtime takes for 0
    w = w / (w.sum(-1, keepdim=True) + 1)
    w = ((1 - alpha) * w + alpha / h.shape[-1]) / eps
    return w / (w.sum(-1, keepdim=True) + 1)


def _adaptive_k(h: Tensor, x: Tensor, k_min: float, k_max: float) -> Tensor:
    """How many pixels ``[B, 1, 1]`` of maps x with entropies h ``[B, C]`` are averaged.

    The published implementation's arithmetic, in float32 unless the maps are float64: of 100
    pixels, k_min = k_max = 0.29 are 29 in float32, in float64 they are 28.
    """
    h_mean = h.mean(-1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    pixels = x.shape[2:].numel()
    k_ratio = k_min + (k_max - k_min) * h_mean
    return (k_ratio * pixels).floor().clamp(1, pixels).view(-1, 1, 1)


def _entropy(a: Tensor, eps: float) -> Tensor:
    """Spatial entropy ``[B, C]`` of the energies of magnitudes ``[B, C, N]``, 1 = spread evenly."""
    N = a.shape[-1]
    e = a.double().square().div_(eps)  # see `_channel_weights`
    p = e.div_(e.sum(-1, keepdim=True) + 1)
    h = -(p / eps).add_(1).log_().add_(math.log(eps)).mul_(p).sum(-1)
    return h / math.log(N) if N > 1 else h * 0


# The norms ``[B, S]`` of `atf` under several settings that have been checked.
atf_each = partial(kernels.norms, by_torch=_by_torch)
