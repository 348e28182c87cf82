# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
"""ATF on CUDA devices, compiled by Triton: one kernel launch per feature map and setting.

A program computes the norm of one sample under one setting. It goes through the sample in *tiles*
of CHANNELS channels by all PIXELS of their maps, both padded to powers of two, and does so twice:

    1  for each tile    1 - h of its channels; then k, from the mean of h
    2  for each tile    root of the mean of the k largest energies; their sum, weighted

The second time the tiles come from the device's L2 cache, if it holds one sample for each program
that runs. Nothing waits for the device: k stays on it. The mathematics is that of the CPU kernel,
which documents it; what differs are sums of products, which not every device rounds only once.
"""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from triton import language as tl

from fusenorm_openood.kernels import LOG1P, Settings

C0, C1, C2, C3, C4, C5, C6 = (tl.constexpr(c) for c in LOG1P)
SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
MANTISSA = tl.constexpr(0x7FFFFF)
INFINITY = tl.constexpr(0x7F800000)
LN2 = tl.constexpr(0.6931471805599453)
TILE = 4096  # magnitudes in a tile
# Maps [C, N], compared with torch before the first use; every map compiles a kernel of its own.
TRIALS = ((5, 100),)


def norms(x: Tensor, settings: Settings) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]``.

    The maps are float32, float16 or bfloat16, of any strides, with 1 < N <= 2^14.
    """
    B, C, N = x.shape
    pixels = triton.next_power_of_2(N)
    channels = max(min(TILE // pixels, triton.next_power_of_2(C)), 1)
    out = x.new_empty(len(settings), B, dtype=torch.float64)
    spreads = x.new_empty(len(settings), B, C, dtype=torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for s, (k_min, k_max, alpha, eps) in enumerate(settings):
            _norm[(B,)](
                x, spreads[s], out[s], C, N, *x.stride(),
                k_min, k_max, alpha, eps, channels, pixels,
                num_warps=min(max(channels * pixels // 512, 1), 16), enable_fp_fusion=True,
            )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, spreads, out, C, N, stride_b, stride_c, stride_n,
    k_min: tl.float64, k_max: tl.float64, alpha: tl.float64, eps: tl.float64,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    maps = x + b * stride_b
    c = tl.arange(0, CHANNELS)
    n = tl.arange(0, PIXELS)
    log_n = tl.log(N.to(tl.float64))

    total = tl.zeros((), tl.float64)  # of 1 - h
    for first in range(0, C, CHANNELS):
        inside = (first + c)[:, None] < C
        bits = _magnitudes(maps, first + c, n, stride_c, stride_n, C, N)
        magnitudes, unit = _scaled(bits)
        energy = tl.sum(magnitudes * magnitudes, 1).to(tl.float64) * unit * unit
        scale = tl.sqrt(N / (energy + eps)) * unit
        terms = _divergence(magnitudes, scale.to(tl.float32)[:, None], (N * eps).to(tl.float32))
        divergence = tl.sum(tl.where((n[None, :] < N) & inside, terms, 0.0), 1).to(tl.float64)
        spread = eps / (energy + eps) * (1 - 1 / log_n) + divergence / (N * log_n)
        spread = tl.where(tl.max(bits, 1) >= INFINITY, float("nan"), spread)
        spread = tl.where(first + c < C, spread, 0.0)
        tl.store(spreads + b * C + first + c, spread.to(tl.float32), mask=first + c < C)
        total += tl.sum(spread, 0)
    tl.debug_barrier()  # other threads read the spreads than wrote them

    h = 1 - total / C
    k = _adaptive_k(tl.where(h == h, h, 0.0), k_min, k_max, N)
    plain = (1 - alpha) / (total + eps)
    w_total = plain * total + alpha + eps
    norm = tl.zeros((), tl.float64)
    for first in range(0, C, CHANNELS):
        bits = _magnitudes(maps, first + c, n, stride_c, stride_n, C, N)
        magnitudes, unit = _scaled(bits)
        top = _top_k_sum(magnitudes, k) / k.to(tl.float32)
        spread = tl.load(spreads + b * C + first + c, mask=first + c < C, other=0.0)
        w = (plain * spread.to(tl.float64) + alpha / C) / w_total
        norm += tl.sum(tl.where(first + c < C, w * tl.sqrt(top).to(tl.float64) * unit, 0.0), 0)
    tl.store(out + b, norm)


@triton.jit
def _adaptive_k(h, k_min, k_max, N):
    """How many of N pixels are averaged at mean entropy h: the published float32 arithmetic."""
    # As h <= 1, the minimum changes no value; it keeps the compiler from fusing the product with
    # the sum, which would round only once.
    k_range = tl.cast(k_max - k_min, tl.float32)
    k_ratio = tl.cast(k_min, tl.float32) + tl.minimum(k_range * h.to(tl.float32), k_range)
    k = tl.floor(k_ratio * N.to(tl.float32))
    return tl.minimum(tl.maximum(k, 1.0), N).to(tl.int32)


@triton.jit
def _magnitudes(maps, c, n, stride_c, stride_n, C, N):
    """Bit patterns of |x| in float32, a tile ``[c, n]``, 0 outside the map."""
    at = maps + c.to(tl.int64)[:, None] * stride_c + n.to(tl.int64)[None, :] * stride_n
    values = tl.load(at, mask=(c[:, None] < C) & (n[None, :] < N), other=0.0).to(tl.float32)
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scaled(bits):
    """Magnitudes in units of a power of two per channel, so that squares stay within float32."""
    exponent = tl.minimum(tl.maximum(tl.max(bits, 1) >> 23, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True) * inverse[:, None], unit.to(tl.float64)


@triton.jit
def _divergence(a, scale, floor):
    """q log(q + floor) - q + 1 with q = (a scale)^2; see the CPU's kernel.

    Products are made exact by halves of 12 bits, for not every device has a fused multiply-add.
    """
    root = a * scale
    a_high, scale_high, root_high = _upper(a), _upper(scale), _upper(root)
    a_low, scale_low, root_low = a - a_high, scale - scale_high, root - root_high
    rest = ((a_high * scale_high - root) + a_high * scale_low + a_low * scale_high) + (
        a_low * scale_low
    )
    d = (root_high * root_high - 1.0) + (root_low * (root + root_high) + 2.0 * root * rest)
    u = d + floor
    bits = (u + 1.0).to(tl.int32, bitcast=True) - SQRT_HALF
    exponent = bits >> 23
    near = exponent == 0
    r = tl.where(near, u, ((bits & MANTISSA) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0)
    rr = r * r
    series = (C0 + C1 * r) + rr * ((C2 + C3 * r) + rr * ((C4 + C5 * r) + rr * C6))
    tail = rr * (r * series - 0.5)
    log = exponent.to(tl.float32) * LN2 + (r + tail)
    return tl.where(near, floor + tail, log - d) + d * log


@triton.jit
def _upper(a):
    """A number cut to the upper 12 bits of its significand."""
    return (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _top_k_sum(magnitudes, k):
    """The sum of the k largest squares of each channel."""
    # The k-th largest is found by bisection of bit patterns, which sort as the magnitudes do; low
    # has k or more above it, high k or fewer.
    bits = magnitudes.to(tl.int32, bitcast=True)
    high = tl.max(bits, 1)
    low = tl.zeros_like(high) - 1
    while tl.max(high - low, 0) > 1:
        t = tl.maximum(low + ((high - low) >> 1), 0)
        above = tl.sum((bits > t[:, None]).to(tl.int32), 1)
        high = tl.where(above <= k, t, high)
        low = tl.where(above < k, low, t)  # low = high ends a search at exactly k
    t = high[:, None]
    larger = tl.sum(tl.where(bits > t, magnitudes * magnitudes, 0.0), 1)
    kth = high.to(tl.float32, bitcast=True)
    return larger + (k - tl.sum((bits > t).to(tl.int32), 1)).to(tl.float32) * kth * kth
