"""k is what the document's code computes, to the last rounding, in every backend."""

import inspect
import random
from functools import cache
from types import CodeType

import pytest
import torch
from torch import Tensor

from fusenorm_openood.method.atf import adaptive_k
from tests.document import adaptive_topk_channel_weight
from tests.oracle import k_oracle

SIZES = [1, 2, 3, 4, 7, 10, 12, 14, 28, 32, 56, 100]


@cache
def document_rule() -> CodeType:
    """The document's own two lines."""
    lines = [line.strip() for line in inspect.getsource(adaptive_topk_channel_weight).splitlines()]
    rule = [line for line in lines if line.startswith(("k_ratio =", "k_vals ="))]
    assert len(rule) == 2
    return compile("\n".join(rule), "document", "exec")


def document_k(entropy_mean: Tensor, k_min: float, k_max: float, side: int) -> Tensor:
    given = {"entropy_mean": entropy_mean, "k_min": k_min, "k_max": k_max, "H": side, "W": side}
    exec(document_rule(), given)
    return given["k_vals"]


@cache
def cases() -> list[tuple[float, float, float, int]]:
    """h, k_min, k_max and the side of a map: equal fractions in percent, unequal ones, any."""
    draw = random.Random(0)
    chosen = [(draw.random(), k / 100, k / 100, side) for k in range(1, 101) for side in SIZES]
    for _ in range(600):
        k_min, k_max = sorted(draw.choices(range(1, 101), k=2))
        h = draw.choice([0.0, 1.0, draw.random(), draw.random()])
        chosen.append((h, k_min / 100, k_max / 100, draw.choice(SIZES)))
    for _ in range(300):
        k_min, k_max = sorted([1 - draw.random(), 1 - draw.random()])
        chosen.append((draw.random(), k_min, k_max, draw.choice(SIZES)))
    return chosen


@cache
def expected(dtype: torch.dtype) -> list[int]:
    return [
        int(document_k(torch.tensor([h], dtype=dtype), k_min, k_max, side))
        for h, k_min, k_max, side in cases()
    ]


def telling() -> list[int]:
    """Cases in which float64 would give another k."""
    both = zip(expected(torch.float32), expected(torch.float64), strict=True)
    return [i for i, (single, double) in enumerate(both) if single != double]


def test_the_precision_decides_on_k_in_some_cases():
    """Otherwise the other tests of this file would show nothing."""
    assert len(telling()) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_torch(dtype):
    found = [
        int(adaptive_k(torch.tensor([h], dtype=dtype), k_min, k_max, side * side))
        for h, k_min, k_max, side in cases()
    ]
    assert found == expected(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_the_oracle(dtype):
    real = torch.empty(0, dtype=dtype).numpy().dtype.type
    found = [k_oracle(real, h, k_min, k_max, side * side) for h, k_min, k_max, side in cases()]
    assert found == expected(dtype)


def test_of_numba():
    pytest.importorskip("numba")
    from fusenorm_openood.kernels.cpu import _adaptive_k

    found = [_adaptive_k(h, k_min, k_max, side * side) for h, k_min, k_max, side in cases()]
    assert found == expected(torch.float32)


def test_of_triton():
    pytest.importorskip("triton")
    from tests.kernels.triton_k import store_k

    device = "cuda" if torch.cuda.is_available() else "cpu"
    some = [*telling()[:40], *range(0, len(cases()), 100)]  # the interpreter is slow
    given = torch.tensor([cases()[i] for i in some], dtype=torch.float64, device=device)
    h, k_min, k_max, side = given.T.contiguous()
    k = torch.zeros(len(some), dtype=torch.int64, device=device)
    store_k[(len(some),)](h, k_min, k_max, (side**2).long(), k)
    assert k.tolist() == [expected(torch.float32)[i] for i in some]
