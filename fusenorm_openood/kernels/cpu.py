# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""ATF on the CPU, compiled by numba: SIMD vectors within a sample, threads over samples.

**What is computed from.** ATF depends on magnitudes |x| only. They are kept as int32, the bit
patterns of float32: those of numbers >= 0 sort as the numbers do, so that the k largest can be
found by comparing integers, and a bit pattern is itself a cheap, rough logarithm.

**Rows and tiles.** A vector has LANES = 16 numbers. A sample is worked through by *groups* of
channels, each a sequence of whole vectors with one of two layouts:

    a row:  one channel, LANES of its pixels per vector, the last one padded with 0; for large maps
            and for few channels
    a tile: LANES channels, one pixel of each per vector; for small maps and channels_last

                       row                             tile
                       lane 0    lane 1 ...  lane 15   lane 0     lane 1 ...       lane 15
           vector 0    pixel 0   pixel 1     pixel 15  channel c  channel c+1 ...  channel c+15
           vector 1    pixel 16  pixel 17    pixel 31  the same channels, pixel 1

A row would waste lanes on small maps; a tile fills them with channels, and a channels_last map lies
in memory this way. Both run through the same code: it adds up vectors and so has one sum per lane,
that of a channel in a tile; in a row the lanes are added up at the end (``_per_channel``). From
there on whatever belongs to a channel is a vector: in a row the same value in every lane.

**Phases**, of one sample under one setting. k depends on the entropies of all channels, so that
every group is visited twice:

    1  for each group    _fill         its magnitudes are brought into the layout
                         _measure      energy, largest magnitude and 1 - h of each channel
    2                    _adaptive_k   k, from the mean of h
    3  for each group    _top_k_rms    root of the mean of the k largest energies
    4                    _weighted     the sum over channels, weighted

Another setting repeats 2 to 4, and 1 only if it has another eps. Tiles of a whole sample stay in
the thread's scratch memory from phase 1 to phase 3. A row is filled again, or not at all: a float32
row whose numbers are all >= 0, as after a ReLU, already consists of the bit patterns of magnitudes
and is read in place.
"""

import ctypes
import math
import os
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types  # type: ignore[attr-defined]
from numba.extending import overload
from torch import Tensor

from fusenorm_openood.kernels import LOG1P, Settings
from fusenorm_openood.kernels.simd import (
    BLOCK,
    LANES,
    as_bits,
    as_float,
    every,
    fetch_add,
    fma,
    holds,
    in_any_lane,
    lane_max,
    lane_sum,
    larger,
    load,
    pointer_to,
    prefetch,
    smaller,
    sqrt,
    store,
    to_double,
    to_float,
    to_single,
    transpose,
    where,
)

# Maps [C, N] of each layout and each way of filling it, compared with torch before the first use.
TRIALS = ((3, 528), (3, 100), (21, 100), (21, 4))

ROW = 512  # pixels from which a row is faster than a tile
PART = 32 * LANES  # numbers summed in float32 before the sum is added to one in float64
EVEN = 0.125  # mean of q log q below which its plain sum would lose too many digits
GUESS = np.float32(1.2)  # first guess of the k-th largest magnitude, in units of the channel's rms

ZERO, ONE, MAGNITUDE = np.int32(0), np.int32(1), np.int32(0x7FFFFFFF)
MANTISSA, MANTISSA_BITS = np.int32(0x7FFFFF), np.int32(23)
SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
F_ZERO, F_HALF, F_ONE, F_LARGE = (np.float32(x) for x in (0, 0.5, 1, 2.0**126))
LN2 = math.log(2)
LANE = np.arange(LANES, dtype=np.int32)
C0, C1, C2, C3, C4, C5, C6 = (np.float32(c) for c in LOG1P)
# log2(1 + r) = r (l0 + l1 r + ... + l6 r^6) for sqrt(1/2) <= 1 + r <= sqrt(2), with errors below
# 6e-7: numpy's Chebyshev fit.
L0, L1, L2, L3, L4, L5, L6 = map(
    np.float32,
    (1.442696452140808, -0.7213640213012695, 0.4806291460990906, -0.35935065150260925,
     0.29563361406326294, -0.2695062756538391, 0.17212873697280884),
)  # fmt: skip

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_process = os.getpid()  # a process forked from it inherits none of its threads

_jit = njit(error_model="numpy")
_inlined = njit(error_model="numpy", forceinline=True)
_summing = njit(error_model="numpy", fastmath={"reassoc", "contract"})  # in any order


# From a tensor to a job for threads.


class Maps(NamedTuple):
    """How feature maps lie in memory: ``[C, N]`` numbers a sample, ``[N, C]`` if channels_last."""

    format: Any
    by_row: Any
    channels_last: Any
    B: Any
    C: Any
    N: Any
    groups: Any  # kept in scratch memory for a sample: all tiles, or one row
    size: Any  # numbers in a group
    scratch: Any  # bytes of a thread's scratch memory


PLACES = ("x", "settings", "out", "taken", "scratch_at")  # addresses
JOB = np.dtype([(name, np.int64) for name in (*PLACES, *Maps._fields, "S")])
# What phase 1 leaves of each channel for phase 3, and phase 3 for phase 4.
CHANNEL_BYTES = 3 * 8 + 3 * 4
_local = local()


def norms(x: Tensor, settings: Settings) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]``.

    The maps are float32, float16 or bfloat16, with N > 1, contiguous as they are or as
    ``[B, N, C]``; others are copied first. Settings with equal eps should follow each other.
    """
    B, C, N = x.shape
    channels_last = not x.is_contiguous() and x.mT.is_contiguous()
    x = x if channels_last else x.contiguous()
    by_row = not channels_last and (N >= ROW or C < LANES)
    groups, vectors = (1, -(-N // LANES)) if by_row else (-(-C // LANES), N)
    size = vectors * LANES
    channels = C + LANES  # the last vector may reach beyond C
    scratch = groups * size * 4 + channels * CHANNEL_BYTES
    scratch = -(-scratch // 64) * 64  # threads share no cache line
    maps = Maps(_FORMATS[x.dtype], by_row, channels_last, B, C, N, groups, size, scratch)
    threads = 1 if os.getpid() != _process else min(torch.get_num_threads(), B)
    given, taken = np.array(settings, np.float64), np.zeros(2, np.int64)
    out = np.empty((len(settings), B))
    # Memory that is kept for later calls: fresh memory costs a page fault per page. Compiled code
    # works with it alone: it allocates nothing and cannot fail.
    memory = getattr(_local, "scratch", None)
    if memory is None or memory.size < threads * scratch:
        memory = _local.scratch = np.empty(threads * scratch, np.uint8)
    places = given.ctypes.data, out.ctypes.data, taken.ctypes.data, memory.ctypes.data
    job = np.array([(x.data_ptr(), *places, *maps, len(settings))], JOB)
    # Threads do the job together: each takes one sample after another. They are torch's own, which
    # wait actively for the next layer: others would compete with them.
    in_torch_threads = _openmp()
    if threads == 1:
        _call(job.ctypes.data)
    elif in_torch_threads:
        in_torch_threads(_work.address, job.ctypes.data, threads, 0)
    else:
        list(_pool(threads).map(_call, [job.ctypes.data] * threads))
    return torch.from_numpy(out)


@cache
def _openmp() -> Any:
    """The function that calls another one in each of torch's threads, if torch uses OpenMP's."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_pool = cache(ThreadPoolExecutor)


@_jit
def _do(job):
    """What each thread does: sample after sample, as long as there is one that nobody has taken."""
    maps = Maps(
        job.format, job.by_row != 0, job.channels_last != 0, job.B, job.C, job.N, job.groups,
        job.size, job.scratch,
    )  # fmt: skip
    settings = carray(pointer_to(job.settings), (job.S, 4), np.float64)
    out = carray(pointer_to(job.out), (job.S, maps.B), np.float64)
    taken = carray(pointer_to(job.taken), 2, np.int64)
    thread = fetch_add(taken[1:], 1)

    at = job.scratch_at + thread * maps.scratch
    groups = carray(pointer_to(at), (maps.groups, maps.size), np.int32)
    if maps.by_row:
        groups[0, maps.N :] = 0
    at += maps.groups * maps.size * 4
    channels = maps.C + LANES
    per_channel = (
        carray(pointer_to(at), channels, np.float64),
        carray(pointer_to(at + 8 * channels), channels, np.float64),
        carray(pointer_to(at + 16 * channels), channels, np.float64),
        carray(pointer_to(at + 24 * channels), channels, np.float32),
        carray(pointer_to(at + 28 * channels), channels, np.int32),
        carray(pointer_to(at + 32 * channels), channels, np.int32),
    )
    while True:
        b = fetch_add(taken, 1)
        if b >= maps.B:
            return
        sample = job.x + b * maps.C * maps.N * (4 if maps.format == 0 else 2)
        _norms(sample, maps, settings, groups, per_channel, out[:, b])


# One sample.


@_jit
def _norms(sample, maps, settings, groups, per_channel, out):
    """Norms of one sample under every setting: the four phases."""
    C, N, by_row = maps.C, maps.N, maps.by_row
    spread, energy, rms, unit, high, nonzero = per_channel
    step = 1 if by_row else LANES  # channels of a group
    # The memory of the next group is prefetched: some bytes with every vector of this one.
    size = 4 if maps.format == 0 else 2
    group_bytes = step * size * (1 if maps.channels_last else N)
    vector_bytes = size * (C if maps.channels_last else LANES)
    # Rows are read in place until one of them has a sign; after a ReLU none has.
    in_place = by_row and maps.format == 0 and N % LANES == 0
    measured, total = math.nan, math.nan
    for s in range(len(settings)):
        k_min, k_max, alpha, eps = settings[s]
        if eps != measured:
            for c in range(0, C, step):
                group = groups[0 if by_row else c // step]
                if in_place:
                    row = _row(sample, maps, c)
                    in_place = not _any_below_zero(row)
                if in_place:
                    group = row
                else:
                    _fill(group, sample, maps, c)
                following = sample + (c // step + 1) * group_bytes
                terms, energies, units, highs, counts = _measure(
                    group, maps, eps, following, vector_bytes
                )
                store(spread, c, terms)
                store(energy, c, energies)
                store(unit, c, units)
                store(high, c, highs)
                store(nonzero, c, counts)
            measured, total = eps, _spreads(spread, energy, C, N, eps)
        h = 1 - total / C
        if not math.isfinite(h):
            out[s] = math.nan
            continue
        k = _adaptive_k(h, k_min, k_max, N)
        guess = every(GUESS)
        for c in range(0, C, step):
            group, following = groups[0 if by_row else c // step], sample + (c + 1) * group_bytes
            if in_place:
                group = _row(sample, maps, c)
            elif by_row:
                _fill(group, sample, maps, c)
            units, highs = _of_group(unit, c, by_row), _of_group(high, c, by_row)
            counts = _of_group(nonzero, c, by_row)
            roots, kth = _top_k_rms(
                group, by_row, k, units, highs, counts, guess, following, vector_bytes
            )
            store(rms, c, roots)
            # Channels of a sample are alike: those done improve the guess for the next.
            guess = where(kth > every(F_ZERO), (guess + kth) * every(F_HALF), guess)
        out[s] = _weighted(spread, rms, C, total, alpha, eps)


@_jit
def _adaptive_k(h, k_min, k_max, N):
    """How many of N pixels are averaged at mean entropy h: the published float32 arithmetic."""
    k_ratio = np.float32(k_min) + np.float32(k_max - k_min) * np.float32(h)
    return np.int32(min(max(np.int64(k_ratio * np.float32(N)), 1), N))


@_summing
def _spreads(spread, energy, C, N, eps):
    """Turn sums of q log(q + floor) into 1 - h, in place, and return their sum over channels."""
    total = 0.0
    for c in range(C):
        spread[c] = eps / (energy[c] + eps) + spread[c] / (N * math.log(N))
        total += spread[c]
    return total


@_summing
def _weighted(spread, rms, C, total, alpha, eps):
    """The norm: the sum over channels of weight times root of the mean of the k largest."""
    plain = (1 - alpha) / (total + eps)
    norm = 0.0
    for c in range(C):
        norm += (plain * spread[c] + alpha / C) * rms[c]
    return norm / (plain * total + alpha + eps)


@_inlined
def _of_group(array, c, by_row):
    """What an array over channels holds for the channels of the group that starts at c."""
    return every(array[c]) if by_row else load(array, c)


@_inlined
def _per_channel(sums, by_row):
    """Sums of channels from the sums of lanes."""
    return every(lane_sum(sums)) if by_row else sums


# Filling a group with magnitudes.


@_inlined
def _row(sample, maps, c):
    """A channel of a float32 map in place, as bits."""
    return carray(pointer_to(sample + c * maps.N * 4), maps.N, np.int32)


@_jit
def _any_below_zero(row):
    signs = every(ZERO)
    for at in range(0, row.size, LANES):
        signs = signs | load(row, at)
    return in_any_lane(signs < every(ZERO))


@_jit
def _fill(group, sample, maps, c):
    """Put the magnitudes of channel c into a row, or of channels c to c + LANES - 1 into a tile."""
    x, size = pointer_to(sample), maps.C * maps.N
    if not maps.by_row and maps.C - c < LANES:
        group[:] = 0
    if maps.format == 0:
        bits = carray(x, size, np.int32)
        _fill_from(bits, group, maps, c, _fill_blocks(bits, group, maps, c))
    elif maps.format == 1:
        _fill_from(carray(x, size, np.int16), group, maps, c, 0)
    else:
        _fill_from(carray(x, size, np.uint16), group, maps, c, 0)


@_jit
def _fill_from(x, group, maps, c, done):
    """Fill a group from numbers of one format, a tile from the lane ``done`` on."""
    C, N = maps.C, maps.N
    count = min(LANES, C - c)
    if maps.by_row:
        row = x[c * N : (c + 1) * N]  # a slice: its indices cannot be negative, which is faster
        for i in range(N):
            group[i] = _magnitude(row[i])
    elif maps.channels_last:
        for i in range(N):
            pixel, vector = x[i * C + c : i * C + c + count], group[i * LANES : (i + 1) * LANES]
            if count == LANES:  # the same with a constant number of steps, which is unrolled
                for lane in range(LANES):
                    vector[lane] = _magnitude(pixel[lane])
            else:
                for lane in range(count):
                    vector[lane] = _magnitude(pixel[lane])
    else:
        for lane in range(done, count):
            row, rest = x[(c + lane) * N : (c + lane + 1) * N], group[lane:]
            for i in range(N):
                rest[i * LANES] = _magnitude(row[i])


@_jit
def _fill_blocks(x, group, maps, c):
    """Fill a tile of float32 by blocks of BLOCK x BLOCK; return how many lanes are done."""
    N, lanes = maps.N, min(LANES, maps.C - c) // BLOCK * BLOCK
    if maps.by_row or maps.channels_last or N < BLOCK:
        return 0
    for lane in range(0, lanes, BLOCK):
        for start in range(0, N, BLOCK):
            i = min(start, N - BLOCK)  # the last block may overlap the one before
            transpose(x, (c + lane) * N + i, N, group, i * LANES + lane, MAGNITUDE)
    return lanes


def _magnitude(x):
    """The bits of |x| in float32, from the bits of x in its own format."""
    raise NotImplementedError


@overload(_magnitude, inline="always")
def _magnitude_of(x):
    def from_float32(x):
        return np.int32(x & MAGNITUDE)

    def from_bfloat16(x):
        return np.int32((np.int32(x) & np.int32(0x7FFF)) << np.int32(16))

    def from_float16(x):
        bits = np.int32((np.int32(x) & np.int32(0x7FFF)) << np.int32(13))
        rebased = as_bits(as_float(bits) * np.float32(2.0**112))
        not_finite = np.int32(rebased >= np.int32(0x47800000))  # finite ones are below 65536
        return np.int32(rebased + not_finite * np.int32(0x38000000))

    return {types.int32: from_float32, types.int16: from_bfloat16, types.uint16: from_float16}[x]


# Phase 1: measuring a group.


@_jit
def _measure(group, maps, eps, following, vector_bytes):
    """All that later phases need of the channels of a group.

    Sums of q log(q + floor), with q = N p and floor = N eps, from which 1 - h follows; energies;
    1 / rms, at most 2^126; largest magnitudes; numbers of pixels that are not 0.
    """
    N, by_row = maps.N, maps.by_row
    high, nonzero, energy = every(ZERO), every(ZERO), every(0.0)
    for at in range(0, group.size, LANES):
        bits = load(group, at)
        high = larger(high, bits)
        nonzero = nonzero - holds(bits > every(ZERO))
        a = to_double(as_float(bits))
        energy = fma(a, a, energy)
    high = every(lane_max(high)) if by_row else high
    nonzero, energy = _per_channel(nonzero, by_row), _per_channel(energy, by_row)

    scale = to_single(sqrt(every(float(N)) / (energy + every(eps))))
    floor = every(np.float32(N * eps))
    terms = _per_channel(_entropy_terms(group, scale, floor, following, vector_bytes), by_row)
    # Channels of nearly even energy once more, with more digits; but not dead ones, whose sum 0
    # is exact.
    if in_any_lane((terms < every(EVEN * N)) & (nonzero > every(ZERO))):
        size = N if by_row else group.size
        divergence = _per_channel(_divergence(group, size, scale, floor), by_row)
        terms = divergence - every(N * eps) / (energy + every(eps))
    unit = every(F_ONE) / to_single(sqrt(energy * every(1 / N)))
    return terms, energy, where(unit < every(F_LARGE), unit, every(F_LARGE)), high, nonzero


@_jit
def _entropy_terms(group, scale, floor, following, vector_bytes):
    """Sums of q log(q + floor), q = (a scale)^2."""
    sums = every(0.0)
    for start in range(0, group.size, PART):
        part = every(F_ZERO)
        for at in range(start, min(start + PART, group.size), LANES):
            prefetch(following + at // LANES * vector_bytes)
            root = as_float(load(group, at)) * scale
            q = root * root
            # q + floor = 2^e (1 + r) with sqrt(1/2) <= 1 + r < sqrt(2), by its bits
            bits = as_bits(q + floor) - every(SQRT_HALF)
            r = as_float((bits & every(MANTISSA)) + every(SQRT_HALF)) - every(F_ONE)
            series = fma(fma(fma(every(L6), r, every(L5)), r, every(L4)), r, every(L3))
            series = fma(fma(fma(series, r, every(L2)), r, every(L1)), r, every(L0))
            log2 = fma(series, r, to_float(bits >> every(MANTISSA_BITS)))
            part = fma(q, log2, part)
        sums = sums + to_double(part)
    return sums * every(LN2)


@_jit
def _divergence(group, size, scale, floor):
    """Sums of q log(q + floor) - q + 1, q = (a scale)^2, to a few units in the last place.

    Of ``size`` numbers, the padding of a row left out: each number of it would add 1.
    """
    # The sum of q follows from the energy, so that this gives the sum of q log(q + floor). Where
    # the energy is spread almost evenly, that one is a small difference of large terms; here
    # (floor = 0) every term is at least 0 and vanishes to second order at q = 1, and no digits
    # cancel. The deviation d = q - 1 comes from the exact product; q itself is never rounded.
    sums = every(0.0)
    for start in range(0, group.size, PART):
        part = every(F_ZERO)
        for at in range(start, min(start + PART, group.size), LANES):
            a = as_float(load(group, at))
            root = a * scale
            rest = fma(a, scale, every(F_ZERO) - root)
            d = fma(root, root, every(-F_ONE)) + (root + root) * rest
            u = d + floor
            bits = as_bits(u + every(F_ONE)) - every(SQRT_HALF)
            exponent = bits >> every(MANTISSA_BITS)
            near = exponent == every(ZERO)
            r = as_float((bits & every(MANTISSA)) + every(SQRT_HALF)) - every(F_ONE)
            r = where(near, u, r)
            rr = r * r
            low = fma(fma(every(C3), r, every(C2)), rr, fma(every(C1), r, every(C0)))
            series = fma(fma(every(C6), rr, fma(every(C5), r, every(C4))), rr * rr, low)
            tail = rr * fma(series, r, every(-F_HALF))  # log(1 + r) - r
            log = fma(to_float(exponent), every(np.float32(LN2)), r + tail)
            term = fma(d, log, where(near, floor + tail, log - d))
            inside = load(LANE, 0) < every(np.int32(size - at))
            part = part + where(inside, term, every(F_ZERO))
        sums = sums + to_double(part)
    return sums


# Phase 3: the k largest of a group.


@_jit
def _top_k_rms(group, by_row, k, unit, high, nonzero, guess, following, vector_bytes):
    """Roots of the mean of the k largest energies; the k-th largest magnitudes, in units of rms."""
    # Per channel a threshold is searched for above which k magnitudes lie, between low (k or more
    # lie above it) and high (k or fewer do). It may end with k - 1 or k + 1 above it: then one
    # energy is added or taken away. With ties it ends where no number is left between low and high.
    wanted, one = every(k), every(ONE)
    low, above_low = every(ZERO), nonzero
    few = nonzero <= wanted
    high, above_high = where(few, low, high), where(few, nonzero, low)
    t = as_bits(guess / unit)
    searching = high - low > one
    step = 0
    while in_any_lane(searching):
        t = where(searching, larger(smaller(t, high - one), low + one), high)
        above = every(ZERO)
        for at in range(0, group.size, LANES):
            above = above + holds(load(group, at) > t)
        above = every(ZERO) - _per_channel(above, by_row)
        up, down = searching & (above >= wanted - one), searching & (above <= wanted + one)
        low, above_low = where(up, t, low), where(up, above, above_low)
        high, above_high = where(down, t, high), where(down, above, above_high)
        searching = high - low > one
        step += 1
        t = _between(low, high, above_low, above_high, wanted, step)

    sums, below, beyond = every(0.0), every(ZERO), every(MAGNITUDE)
    for start in range(0, group.size, PART):
        part = every(F_ZERO)
        for at in range(start, min(start + PART, group.size), LANES):
            if by_row:
                prefetch(following + at // LANES * vector_bytes)
            bits = load(group, at)
            more = bits > high
            below = larger(below, where(more, every(ZERO), bits))
            beyond = smaller(beyond, where(more, bits, every(MAGNITUDE)))
            a = as_float(where(more, bits, every(ZERO))) * unit
            part = fma(a, a, part)
        sums = sums + to_double(part)
    if by_row:
        below = every(lane_max(below))
        beyond = every(ZERO) - every(lane_max(every(ZERO) - beyond))
    missing = to_float(wanted - above_high)
    last = as_float(where(wanted > above_high, below, beyond)) * unit
    last = where(wanted == above_high, every(F_ZERO), missing * (last * last))
    mean = to_single((_per_channel(sums, by_row) + to_double(last)) * every(1 / k))
    return to_double(sqrt(mean) / unit), as_float(high) * unit


@_inlined
def _between(low, high, above_low, above_high, k, step):
    """The next threshold, in bits: interpolated, for the logarithm of the count is about linear.

    Bit patterns serve as logarithms of the counts. Every fourth step halves the interval instead.
    """
    if step % 4 == 3:
        return low + ((high - low) >> every(ONE))
    a, b, half = as_float(low), as_float(high), every(F_HALF)
    top, bottom = as_bits(to_float(above_low) + half), as_bits(to_float(above_high) + half)
    part = to_float(top - as_bits(to_float(k) + half)) / to_float(larger(top - bottom, every(ONE)))
    return as_bits(fma(b - a, part, a))


# Compiling.


def _sources(folder: Path) -> int:
    """A number that changes with the kernels' sources, of which numba's cache looks at one only."""
    return sum(zlib.crc32(path.read_bytes()) for path in folder.glob("*.py"))


def _compiled(sources: int) -> Any:
    """What threads run, compiled, and kept on disk until the sources change."""

    def work(job):
        sources  # noqa: B018  a variable of the closure is part of the key of numba's cache
        _do(carray(job, 1)[0])

    signature = types.void(types.CPointer(from_dtype(JOB)))
    try:
        return cfunc(signature, cache=True)(work)
    except (RuntimeError, OSError) as error:  # no writable folder; no space
        warnings.warn(
            f"the compiled CPU kernels cannot be saved ({error}), so each process compiles them "
            "anew: set NUMBA_CACHE_DIR to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )
        return cfunc(signature)(work)


_work = _compiled(_sources(Path(__file__).parent))
_call = _work.ctypes
