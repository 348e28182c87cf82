# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""ATF on the CPU, compiled by numba: vectors of pixels or of channels, threads over samples.

A sample is worked through in *groups* of the bit patterns of magnitudes, vector after vector, in
one of two shapes. A *row* holds the pixels of one channel, for large maps. A *tile* holds LANES
channels side by side, a pixel a vector, for small maps and channels_last. What is known of a
channel is a vector either way: of that channel in every lane, or of a channel a lane.

A group is visited twice: for the spread 1 - h of its channels, from which k follows, and for the
mean of the k largest energies, by a search among bit patterns, whose order is that of magnitudes.
"""

import ctypes
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types  # type: ignore[attr-defined]
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.kernels.logarithm import LOG1P, LOG2
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

ROW = 512  # pixels from which a row keeps the vector units busy
PART = 32 * LANES  # numbers that are summed in float32, before float64 takes over
EVEN = 0.125  # mean of q log q below which its sum would lack digits
GUESS = np.float32(1.2)  # the k-th largest magnitude, in units of the channel's rms

ZERO, ONE, MAGNITUDE = np.int32(0), np.int32(1), np.int32(0x7FFFFFFF)
MANTISSA, MANTISSA_BITS = np.int32(0x7FFFFF), np.int32(23)
SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
F_ZERO, F_HALF, F_ONE, F_LARGE = (np.float32(x) for x in (0, 0.5, 1, 2.0**126))
LN2 = math.log(2)
LANE = np.arange(LANES, dtype=np.int32)
C0, C1, C2, C3, C4, C5, C6 = (np.float32(c) for c in LOG1P)
L0, L1, L2, L3, L4, L5, L6 = (np.float32(c) for c in LOG2)

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_process = os.getpid()  # one that was forked off from it has no threads to work with

_jit = njit(error_model="numpy")
_inlined = njit(error_model="numpy", forceinline=True)
_summing = njit(error_model="numpy", fastmath={"reassoc", "contract"})  # in any order


class Maps(NamedTuple):
    """How feature maps lie in memory: ``[C, N]`` numbers a sample, ``[N, C]`` if channels_last."""

    format: Any
    by_row: Any
    channels_last: Any
    B: Any
    C: Any
    N: Any
    groups: Any  # that are kept of a sample
    size: Any  # of one of them


PLACES = ("x", "settings", "out", "taken", "scratch")  # addresses
JOB = np.dtype([(name, np.int64) for name in (*PLACES, *Maps._fields, "S")])
_local = local()


def norms(x: Tensor, settings: Sequence[tuple[float, float, float, float]]) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]``.

    The maps are float32, float16 or bfloat16, with N > 1; any but C-contiguous ones, and those
    whose transpose ``[B, N, C]`` is, are copied first. ``settings`` are
    ``(k_min, k_max, alpha, eps)``, best in an order in which equal eps follow each other.
    """
    B, C, N = x.shape
    channels_last = not x.is_contiguous() and x.mT.is_contiguous()
    x = x if channels_last else x.contiguous()
    by_row = not channels_last and (N >= ROW or C < LANES)
    groups, vectors = (1, -(-N // LANES)) if by_row else (-(-C // LANES), N)
    maps = Maps(_FORMATS[x.dtype], by_row, channels_last, B, C, N, groups, vectors * LANES)
    threads = 1 if os.getpid() != _process else min(torch.get_num_threads(), B)
    given, taken = np.array(settings, np.float64), np.zeros(2, np.int64)
    out = np.full((len(settings), B), np.nan)  # in case a thread ends early, out of memory say
    scratch = _scratch(threads * maps.groups * maps.size)
    places = (array.ctypes.data for array in (given, out, taken, scratch))
    job = np.array([(x.data_ptr(), *places, *maps, len(settings))], JOB)
    _on_threads(threads, job.ctypes.data)
    return torch.from_numpy(out)


def _scratch(size: int) -> NDArray[np.int32]:
    """Memory that stays with a thread that scores: every page of fresh one would cost a fault."""
    kept = getattr(_local, "scratch", None)
    if kept is None or kept.size < size:
        kept = _local.scratch = np.empty(size, np.int32)
    return kept


def _on_threads(threads: int, job: int) -> None:
    """Have threads do a job together: each takes one sample after another.

    They are those of torch: after a layer these wait for the next one wide awake, and others would
    have to share the processor with them.
    """
    in_torch_threads = _openmp()
    if threads == 1:
        _call(job)
    elif in_torch_threads:
        in_torch_threads(_work.address, job, threads, 0)
    else:
        list(_threads(threads).map(_call, [job] * threads))


@cache
def _openmp() -> Any:
    """What calls a function in each of torch's threads, if they are GNU OpenMP's or alike."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


@_jit
def _do(job):
    """Sample after sample, as long as there are any that nobody has taken."""
    maps = Maps(
        job.format,
        job.by_row != 0,
        job.channels_last != 0,
        job.B,
        job.C,
        job.N,
        job.groups,
        job.size,
    )
    settings = carray(pointer_to(job.settings), (job.S, 4), np.float64)
    out = carray(pointer_to(job.out), (job.S, maps.B), np.float64)
    taken = carray(pointer_to(job.taken), 2, np.int64)
    thread = fetch_add(taken[1:], 1)
    mine = job.scratch + thread * maps.groups * maps.size * 4
    groups = carray(pointer_to(mine), (maps.groups, maps.size), np.int32)
    if maps.by_row:
        groups[0, maps.N :] = 0
    channels = maps.C + LANES  # for a whole vector of the last one
    known = (
        np.empty(channels), np.empty(channels), np.empty(channels),
        np.empty(channels, np.float32), np.empty(channels, np.int32), np.empty(channels, np.int32),
    )  # fmt: skip
    while True:
        b = fetch_add(taken, 1)
        if b >= maps.B:
            return
        sample = job.x + b * maps.C * maps.N * (4 if maps.format == 0 else 2)
        _norms(sample, maps, settings, groups, known, out[:, b])


@_jit
def _norms(sample, maps, settings, groups, known, out):
    """Norms of one sample under every setting."""
    C, N, by_row = maps.C, maps.N, maps.by_row
    spread, energy, rms, unit, high, nonzero = known
    step = 1 if by_row else LANES  # channels of a group
    # What is read next is brought closer, a vector's share with every vector.
    size = 4 if maps.format == 0 else 2
    step_bytes = step * size * (1 if maps.channels_last else N)
    share = size * (C if maps.channels_last else LANES)
    # Rows are read where they lie until one has a sign, as none has after a ReLU.
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
                ahead = sample + (c // step + 1) * step_bytes
                terms, energies, units, highs, counts = _measure(group, maps, eps, ahead, share)
                store(spread, c, terms)
                store(energy, c, energies)
                store(unit, c, units)
                store(high, c, highs)
                store(nonzero, c, counts)
            measured, total = eps, _finish(spread, energy, C, N, eps)
        h = 1 - total / C
        if not math.isfinite(h):
            out[s] = math.nan
            continue
        k = np.int32(min(max(math.floor((k_min + (k_max - k_min) * h) * N), 1), N))
        guess = every(GUESS)
        for c in range(0, C, step):
            group, ahead = groups[0 if by_row else c // step], sample + (c + 1) * step_bytes
            if in_place:
                group = _row(sample, maps, c)
            elif by_row:
                _fill(group, sample, maps, c)
            units, highs = _known(unit, c, by_row), _known(high, c, by_row)
            counts = _known(nonzero, c, by_row)
            roots, kth = _top(group, by_row, k, units, highs, counts, guess, ahead, share)
            store(rms, c, roots)
            guess = where(kth > every(F_ZERO), (guess + kth) * every(F_HALF), guess)
        out[s] = _weighted(spread, rms, C, total, alpha, eps)


@_summing
def _finish(spread, energy, C, N, eps):
    """Make the spread 1 - h of sums of q log(q + floor); the sum over channels."""
    total = 0.0
    for c in range(C):
        spread[c] = eps / (energy[c] + eps) + spread[c] / (N * math.log(N))
        total += spread[c]
    return total


@_summing
def _weighted(spread, rms, C, total, alpha, eps):
    """The norm: the sum over channels of weight and root of the mean of the k largest energies."""
    plain = (1 - alpha) / (total + eps)
    norm = 0.0
    for c in range(C):
        norm += (plain * spread[c] + alpha / C) * rms[c]
    return norm / (plain * total + alpha + eps)


@_inlined
def _known(array, c, by_row):
    """What is known of the channels of a group."""
    return every(array[c]) if by_row else load(array, c)


@_inlined
def _joined(sums, by_row):
    """Sums of channels from the sums of lanes."""
    return every(lane_sum(sums)) if by_row else sums


# Reading a group.


@_inlined
def _row(sample, maps, c):
    """A channel of a float32 map where it lies, as bits."""
    return carray(pointer_to(sample + c * maps.N * 4), maps.N, np.int32)


@_jit
def _any_below_zero(row):
    signs = every(ZERO)
    for at in range(0, row.size, LANES):
        signs = signs | load(row, at)
    return in_any_lane(signs < every(ZERO))


@_jit
def _fill(group, sample, maps, c):
    """Put the magnitudes of a channel, or of LANES channels from it on, into a group."""
    x, size = pointer_to(sample), maps.C * maps.N
    if maps.format == 0:
        _fill_from(carray(x, size, np.int32), group, maps, c)
    elif maps.format == 1:
        _fill_from(carray(x, size, np.int16), group, maps, c)
    else:
        _fill_from(carray(x, size, np.uint16), group, maps, c)


@_jit
def _fill_from(x, group, maps, c):
    C, N = maps.C, maps.N
    if maps.by_row:
        row = x[c * N : (c + 1) * N]  # a slice, for an index that may be negative costs
        for i in range(N):
            group[i] = _magnitude(row[i])
        return
    count = min(LANES, C - c)
    if count < LANES:
        group[:] = 0
    if maps.channels_last:
        for i in range(N):
            pixel, vector = x[i * C + c : i * C + c + count], group[i * LANES : (i + 1) * LANES]
            if count == LANES:  # as below, unrolled
                for lane in range(LANES):
                    vector[lane] = _magnitude(pixel[lane])
            else:
                for lane in range(count):
                    vector[lane] = _magnitude(pixel[lane])
    else:
        for lane in range(_fill_blocks(x, group, c, count, N), count):
            row, rest = x[(c + lane) * N : (c + lane + 1) * N], group[lane:]
            for i in range(N):
                rest[i * LANES] = _magnitude(row[i])


def _fill_blocks(x, group, c, count, N):
    """Fill a tile block by block, where float32 maps have whole ones: how many lanes it did."""
    raise NotImplementedError


@overload(_fill_blocks)
def _fill_blocks_of(x, group, c, count, N):
    def blocks(x, group, c, count, N):
        if N < BLOCK:
            return 0
        for lane in range(0, count - BLOCK + 1, BLOCK):
            for start in range(0, N, BLOCK):
                i = min(start, N - BLOCK)  # the last block may overlap the one before
                transpose(x, (c + lane) * N + i, N, group, i * LANES + lane, MAGNITUDE)
        return count // BLOCK * BLOCK

    return blocks if x.dtype == types.int32 else lambda x, group, c, count, N: 0


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
        rebased = as_bits(as_float(bits) * np.float32(2.0**112))
        endless = np.int32(rebased >= np.int32(0x47800000))  # infinity or NaN; else below 65536
        return np.int32(rebased + endless * np.int32(0x38000000))

    return {types.int32: from_float32, types.int16: from_bfloat16, types.uint16: from_float16}[x]


# The spread.


@_jit
def _measure(group, maps, eps, ahead, share):
    """Of the channels of a group all that is needed but k.

    Their sums of q log(q + floor), with q = N p and floor = N eps; energies; 1 / rms, or as much
    as float32 holds; largest magnitudes; numbers of pixels that are not 0.
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
    nonzero, energy = _joined(nonzero, by_row), _joined(energy, by_row)

    scale = to_single(sqrt(every(float(N)) / (energy + every(eps))))
    floor = every(np.float32(N * eps))
    terms = _joined(_entropy_terms(group, scale, floor, ahead, share), by_row)
    # Not where all is 0, for the sums are, too.
    if in_any_lane((terms < every(EVEN * N)) & (nonzero > every(ZERO))):
        size = N if by_row else group.size
        divergence = _joined(_divergence(group, size, scale, floor), by_row)
        terms = divergence - every(N * eps) / (energy + every(eps))
    unit = every(F_ONE) / to_single(sqrt(energy * every(1 / N)))
    return terms, energy, where(unit < every(F_LARGE), unit, every(F_LARGE)), high, nonzero


@_jit
def _entropy_terms(group, scale, floor, ahead, share):
    """Sums of q log(q + floor), q = (a scale)^2."""
    sums = every(0.0)
    for start in range(0, group.size, PART):
        part = every(F_ZERO)
        for at in range(start, min(start + PART, group.size), LANES):
            prefetch(ahead + at // LANES * share)
            root = as_float(load(group, at)) * scale
            q = root * root
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

    Of ``size`` numbers; of what pads the group to whole vectors the divergence would be 1.

    For floor = 0 a term is at least 0 and vanishes to second order at q = 1, so that the sum over
    pixels keeps its digits where the energy is spread almost evenly; the sum of q is known. The
    deviation d = q - 1 is computed from the exact product, q itself never.
    """
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


# The k largest.


@_jit
def _top(group, by_row, k, unit, high, nonzero, guess, ahead, share):
    """Roots of the mean of the k largest energies; the k-th largest magnitudes times unit, about.

    The search ends where k - 1, k or k + 1 magnitudes are larger than t; then one comes on top, or
    is taken away. Among equal ones it ends where no number is left between low and high.
    """
    wanted, one = every(k), every(ONE)
    low, above_low = every(ZERO), nonzero
    few = nonzero <= wanted
    high, above_high = where(few, low, high), where(few, nonzero, low)
    t = as_bits(guess / unit)
    is_open = high - low > one
    step = 0
    while in_any_lane(is_open):
        t = where(is_open, larger(smaller(t, high - one), low + one), high)
        above = every(ZERO)
        for at in range(0, group.size, LANES):
            above = above + holds(load(group, at) > t)
        above = every(ZERO) - _joined(above, by_row)
        up, down = is_open & (above >= wanted - one), is_open & (above <= wanted + one)
        low, above_low = where(up, t, low), where(up, above, above_low)
        high, above_high = where(down, t, high), where(down, above, above_high)
        is_open = high - low > one
        step += 1
        t = _between(low, high, above_low, above_high, wanted, step)

    sums, below, beyond = every(0.0), every(ZERO), every(MAGNITUDE)
    for start in range(0, group.size, PART):
        part = every(F_ZERO)
        for at in range(start, min(start + PART, group.size), LANES):
            if by_row:
                prefetch(ahead + at // LANES * share)
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
    mean = to_single((_joined(sums, by_row) + to_double(last)) * every(1 / k))
    return to_double(sqrt(mean) / unit), as_float(high) * unit


@_inlined
def _between(low, high, above_low, above_high, k, step):
    """The next magnitude to try, in bits: the logarithm of the count is about linear in it.

    A bit pattern is the logarithm that is at hand for nothing. Every fourth step halves.
    """
    if step % 4 == 3:
        return low + ((high - low) >> every(ONE))
    a, b, half = as_float(low), as_float(high), every(F_HALF)
    top, bottom = as_bits(to_float(above_low) + half), as_bits(to_float(above_high) + half)
    part = to_float(top - as_bits(to_float(k) + half)) / to_float(larger(top - bottom, every(ONE)))
    return as_bits(fma(b - a, part, a))


def _compiled(sources: int) -> Any:
    """What threads run, compiled, and kept until one of the sources changes."""

    def work(job):
        sources  # noqa: B018  of the files that are compiled, numba's cache looks at one only
        _do(carray(job, 1)[0])

    signature = types.void(types.CPointer(from_dtype(JOB)))
    try:
        return cfunc(signature, cache=True)(work)
    except RuntimeError:  # no folder where compiled code could be kept
        return cfunc(signature)(work)


_work = _compiled(sum(zlib.crc32(p.read_bytes()) for p in Path(__file__).parent.glob("*.py")))
_call = _work.ctypes
