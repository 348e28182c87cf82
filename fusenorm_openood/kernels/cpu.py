# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""ATF on the CPU, compiled by numba: parallel over samples, vectorised over pixels or channels.

A sample is worked through in *tiles* of the bit patterns of magnitudes, in one of two shapes. A
row ``[N]`` holds one channel, for maps that are contiguous and large: loops run over its pixels.
A tile ``[N, 64]`` holds 64 channels side by side, for small maps and channels_last: there every
step is one for all 64. Both do the same: the spread 1 - h of a channel, from which k follows, and
the sum of the k largest energies, by a search for the k-th largest among bit patterns, whose order
is that of the magnitudes.
"""

import math
import os
from collections.abc import Sequence
from functools import partial
from threading import Lock

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from fusenorm_openood.kernels.log1p import COEFFICIENTS

LANES = 64  # channels side by side: a whole number of vector registers anywhere
ROW = 256  # pixels from which a row keeps the vector units busy

_ARITHMETIC = {"reassoc", "contract", "nsz"}  # NaN and infinity keep their meaning


def _jit(function, **options):
    options |= {"fastmath": _ARITHMETIC, "error_model": "numpy"}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no folder where compiled code could be kept
        return njit(function, **options)


_inlined = njit(fastmath=_ARITHMETIC, inline="always", error_model="numpy")

ZERO, I1, MAGNITUDE = np.int32(0), np.int32(1), np.int32(0x7FFFFFFF)
MANTISSA, MANTISSA_BITS = np.int32(0x7FFFFF), np.int32(23)
SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
ONE, HALF, LN2 = np.float32(1), np.float32(0.5), np.float32(math.log(2))
C0, C1, C2, C3, C4, C5, C6 = (np.float32(c) for c in COEFFICIENTS)

_lock = Lock()  # not every threading layer of numba may be entered twice at once,
_process = os.getpid()  # nor from a process that was forked off


def norms(x: Tensor, settings: Sequence[tuple[float, float, float]], eps: float) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]`` under ``(k_min, k_max, alpha)``.

    The maps are float32, float16 or bfloat16, with N > 1; any but C-contiguous ones, and those
    whose transpose ``[B, N, C]`` is, are copied first.
    """
    channels_last = not x.is_contiguous() and x.mT.is_contiguous()
    x = x.mT if channels_last else x.contiguous()
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).numpy()
    if x.dtype == torch.float16:
        bits = bits.view(np.uint16)  # so are the two halves told apart
    out = np.empty((len(settings), len(x)))
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = min(torch.get_num_threads(), most)
    given = (bits, channels_last, np.array(settings, dtype=np.float64), eps, out)
    if threads == 1 or os.getpid() != _process:
        _share(*given, 0, 1)
    else:
        before = numba.get_num_threads()
        with _lock:
            numba.set_num_threads(threads)
            try:
                _norms(*given, threads)
            finally:
                numba.set_num_threads(before)
    return torch.from_numpy(out)


@partial(_jit, parallel=True)
def _norms(x, channels_last, settings, eps, out, threads):
    for thread in prange(threads):
        _share(x, channels_last, settings, eps, out, thread, threads)


@_jit
def _share(x, channels_last, settings, eps, out, thread, threads):
    """The samples that one of several threads is to do."""
    B = x.shape[0]
    work = _workspace(x[0], channels_last)
    for b in range(B * thread // threads, B * (thread + 1) // threads):
        _norm(x[b], channels_last, settings, eps, work, out[:, b])


@_jit
def _workspace(x, channels_last):
    """Memory that a thread uses for all of its samples: the magnitudes of one, and more."""
    C, N = (x.shape[1], x.shape[0]) if channels_last else x.shape
    by_row = not channels_last and (N >= ROW or C < LANES)
    tiles = 0 if by_row else (C + LANES - 1) // LANES
    return (
        np.empty(N if by_row else 0, np.int32),
        np.empty((tiles, N, LANES), np.int32),
        np.empty(max(C, tiles * LANES)),
        np.empty(max(C, tiles * LANES)),
        np.empty(LANES),
    )


@_jit
def _norm(x, channels_last, settings, eps, work, out):
    """Norms of one sample, ``[C, N]`` or ``[N, C]``."""
    row, tiles, spread, rms, tops = work
    C, N = (x.shape[1], x.shape[0]) if channels_last else x.shape

    if row.size:
        for c in range(C):
            _load_row(x[c], row)
            spread[c], rms[c] = _row_spread(row, eps)
    for g in range(len(tiles)):
        here = slice(g * LANES, (g + 1) * LANES)
        _load_tile(x, channels_last, g * LANES, tiles[g])
        _tile_spread(tiles[g], eps, spread[here], rms[here])

    total = spread[:C].sum()  # of 1 - h
    h = 1 - total / C
    for s in range(len(settings)):
        k_min, k_max, alpha = settings[s]
        if not math.isfinite(h):
            out[s] = math.nan
            continue
        k = np.int32(min(max(math.floor((k_min + (k_max - k_min) * h) * N), 1), N))
        plain = (1 - alpha) / (total + eps)
        w_total = plain * total + alpha + eps
        guess, norm = 1.2, 0.0  # the k-th largest magnitude, in units of the channel's rms
        if row.size:
            for c in range(C):
                _load_row(x[c], row)
                top, kth = _row_top(row, k, guess * rms[c])
                norm += (plain * spread[c] + alpha / C) / w_total * math.sqrt(top / k)
                if rms[c] > 0:
                    guess = (guess + kth / rms[c]) / 2
        for g in range(len(tiles)):
            _tile_top(tiles[g], k, rms[g * LANES : (g + 1) * LANES], tops)
            for lane in range(min(LANES, C - g * LANES)):
                w = (plain * spread[g * LANES + lane] + alpha / C) / w_total
                norm += w * math.sqrt(tops[lane] / k)
        out[s] = norm


# One channel: a row [N].


@_jit
def _load_row(x, row):
    for i in range(row.size):
        row[i] = _magnitude(x[i])


@_jit
def _row_spread(row, eps):
    """The spread 1 - h of a channel and the root of its mean energy."""
    N = row.size
    energy = 0.0
    for i in range(N):
        a = np.float64(_as_float(row[i]))
        energy += a * a
    scale, floor = np.float32(math.sqrt(N / (energy + eps))), np.float32(N * eps)
    total = 0.0
    for start in range(0, N, 256):  # float32 within a part, float64 over the parts
        part = np.float32(0)
        for i in range(start, min(start + 256, N)):
            part += _divergence(_as_float(row[i]), scale, floor)
        total += part
    return _spread(total, energy, N, eps), math.sqrt(energy / N)


@_jit
def _row_top(row, k, guess):
    """The sum of the k largest energies, and the k-th largest magnitude or one just below it."""
    t, above = ZERO, _above(row, ZERO)
    if above > k:
        low, high, above_low, above_high = ZERO, ZERO, above, ZERO
        for i in range(row.size):
            high = max(high, row[i])
        t = _bits(np.float32(guess))
        step = 0
        while high - low > I1:
            t = max(min(t, np.int32(high - I1)), np.int32(low + I1))
            above = _above(row, t)
            if above == k:
                break
            if above > k:
                low, above_low = t, above
            else:
                high, above_high = t, above
            step += 1
            t = _next(low, high, above_low, above_high, k, step)
        if above != k:
            t = high
            above = _above(row, t)
    top = 0.0
    for i in range(row.size):
        a = np.float64(_as_float(row[i] if row[i] > t else ZERO))
        top += a * a
    kth = np.float64(_as_float(t))
    return top + (k - above) * kth * kth, kth


@_jit
def _above(row, t):
    count = ZERO
    for i in range(row.size):
        count = np.int32(count + np.int32(row[i] > t))
    return count


# LANES channels side by side: a tile [N, LANES].


@_jit
def _load_tile(x, channels_last, first, tile):
    N = tile.shape[0]
    C = min(LANES, (x.shape[1] if channels_last else x.shape[0]) - first)
    if C < LANES:
        tile[:] = 0
    if channels_last:
        for i in range(N):
            for c in range(C):
                tile[i, c] = _magnitude(x[i, first + c])
    else:
        for c in range(C):
            for i in range(N):
                tile[i, c] = _magnitude(x[first + c, i])


@_jit
def _tile_spread(tile, eps, spread, rms):
    """As :func:`_row_spread`, a channel a lane."""
    N = tile.shape[0]
    energy = np.zeros(LANES)
    for i in range(N):
        for c in range(LANES):
            a = np.float64(_as_float(tile[i, c]))
            energy[c] += a * a
    scale, floor = np.empty(LANES, np.float32), np.float32(N * eps)
    for c in range(LANES):
        scale[c] = math.sqrt(N / (energy[c] + eps))
    total, part = np.zeros(LANES), np.empty(LANES, np.float32)
    for start in range(0, N, 64):
        part[:] = 0
        for i in range(start, min(start + 64, N)):
            for c in range(LANES):
                part[c] += _divergence(_as_float(tile[i, c]), scale[c], floor)
        for c in range(LANES):
            total[c] += part[c]
    for c in range(LANES):
        spread[c] = _spread(total[c], energy[c], N, eps)
        rms[c] = math.sqrt(energy[c] / N)


@_jit
def _tile_top(tile, k, rms, tops):
    """As :func:`_row_top`, a channel a lane; a lane that is done keeps low = high."""
    # Allocated here, the compiler knows that none overlaps another: it can vectorise.
    t, above = np.zeros(LANES, np.int32), np.empty(LANES, np.int32)
    low, high = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    above_low, above_high = np.empty(LANES, np.int32), np.zeros(LANES, np.int32)
    for i in range(tile.shape[0]):
        for c in range(LANES):
            high[c] = max(high[c], tile[i, c])
    _tile_above(tile, t, above)
    searching = ZERO
    for c in range(LANES):
        above_low[c] = above[c]
        high[c] = high[c] if above[c] > k else ZERO
        t[c] = _bits(np.float32(1.2 * rms[c]))
        searching += np.int32(high[c] > I1)
    step = 0
    while searching > 0:
        for c in range(LANES):
            inside = max(min(t[c], np.int32(high[c] - I1)), np.int32(low[c] + I1))
            t[c] = inside if high[c] - low[c] > I1 else high[c]
        _tile_above(tile, t, above)
        searching = ZERO
        for c in range(LANES):
            # Selections, not branches: so they are vectorised. An exact count sets both ends.
            is_open = high[c] - low[c] > I1
            up, down = is_open & (above[c] >= k), is_open & (above[c] <= k)
            low[c] = t[c] if up else low[c]
            above_low[c] = above[c] if up else above_low[c]
            high[c] = t[c] if down else high[c]
            above_high[c] = above[c] if down else above_high[c]
            searching += np.int32(high[c] - low[c] > I1)
        step += 1
        for c in range(LANES):
            t[c] = _next(low[c], high[c], above_low[c], above_high[c], k, step)
    _tile_above(tile, high, above)
    for c in range(LANES):
        kth = np.float64(_as_float(high[c]))
        tops[c] = (k - above[c]) * kth * kth
    for i in range(tile.shape[0]):
        for c in range(LANES):
            a = np.float64(_as_float(tile[i, c] if tile[i, c] > high[c] else ZERO))
            tops[c] += a * a


@_jit
def _tile_above(tile, t, above):
    above[:] = 0
    for i in range(tile.shape[0]):
        for c in range(LANES):
            above[c] += np.int32(tile[i, c] > t[c])


# What both shapes share: a few operations on one number.


@_inlined
def _divergence(a, scale, floor):
    """q log(q + floor) - q + 1 with q = (a scale)^2, to a few units in the last place.

    For floor = 0 it is at least 0 and vanishes to second order at q = 1, so that the sum over
    pixels keeps its digits where the energy is spread almost evenly; the sum of q is known. The
    deviation d = q - 1 is computed from the exact product, q itself never.
    """
    root = a * scale
    d = _fma(root, root, -ONE) + (root + root) * _fma(a, scale, -root)
    u = d + floor
    bits = np.int32(_bits(u + ONE) - SQRT_HALF)
    exponent = np.int32(bits >> MANTISSA_BITS)
    near = exponent == ZERO
    r = u if near else _as_float(np.int32((bits & MANTISSA) + SQRT_HALF)) - ONE
    rr = r * r
    series = (C0 + C1 * r) + rr * ((C2 + C3 * r) + rr * ((C4 + C5 * r) + rr * C6))
    tail = rr * (r * series - HALF)  # log(1 + r) - r
    log = np.float32(exponent) * LN2 + (r + tail)
    return (floor + tail if near else log - d) + d * log


@_inlined
def _spread(divergence, energy, N, eps):
    """1 - h from the sum of :func:`_divergence` over the pixels."""
    return eps / (energy + eps) * (1 - 1 / math.log(N)) + divergence / (N * math.log(N))


@_inlined
def _next(low, high, above_low, above_high, k, step):
    """The next magnitude to try, in bits: the logarithm of the count is about linear in it.

    A bit pattern is the logarithm that is at hand for nothing. Every fourth step halves.
    """
    if step % 4 == 3:
        return np.int32(low + ((high - low) >> I1))
    a, b = _as_float(low), _as_float(high)
    top, bottom = _bits(np.float32(above_low) + HALF), _bits(np.float32(above_high) + HALF)
    beyond = np.float32(np.int32(top - _bits(np.float32(k) + HALF)))
    part = beyond / np.float32(max(np.int32(top - bottom), I1))
    return _bits(np.float32(a + (b - a) * part))


def _magnitude(x):
    """The bits of |x| in float32, of x given as the bits of its own type."""
    raise NotImplementedError


@overload(_magnitude, inline="always")
def _magnitude_of(x):
    def from_float32(x):
        return np.int32(x & MAGNITUDE)

    def from_bfloat16(x):
        return np.int32((np.int32(x) & np.int32(0x7FFF)) << np.int32(16))

    def from_float16(x):
        bits = np.int32((np.int32(x) & np.int32(0x7FFF)) << np.int32(13))
        rebased = _bits(_as_float(bits) * np.float32(2.0**112))
        endless = np.int32(rebased >= np.int32(0x47800000))  # infinity or NaN; else below 65536
        return np.int32(rebased + endless * np.int32(0x38000000))

    return {types.int32: from_float32, types.int16: from_bfloat16, types.uint16: from_float16}[x]


@intrinsic
def _as_float(context, x):
    def bitcast(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), bitcast


@intrinsic
def _bits(context, x):
    def bitcast(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), bitcast


@intrinsic
def _fma(context, a, b, c):
    """a b + c, rounded once."""

    def fma(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), fma
