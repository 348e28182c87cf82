"""The rule for k of the Triton kernel, as a kernel of its own."""

import pytest

pytest.importorskip("triton")

import triton
from triton import language as tl

from fusenorm_openood.kernels.cuda import _adaptive_k


@triton.jit
def store_k(h, k_min, k_max, pixels, k):
    i = tl.program_id(0)
    low, high = tl.load(k_min + i), tl.load(k_max + i)
    tl.store(k + i, _adaptive_k(tl.load(h + i), low, high, tl.load(pixels + i)))
