"""A kernel is compared with torch before its first use, and not used if it differs."""

import pytest
import torch

from fusenorm_openood import atf, kernels
from fusenorm_openood.kernels import compare
from fusenorm_openood.method.atf import atf_each

# Ways to be wrong: what the norms of some maps and settings become.
WRONG = {
    "everywhere": lambda norms, x: norms * 1.001,
    "in float32": lambda norms, x: norms * (1.001 if x.dtype == torch.float32 else 1),
    "in float16": lambda norms, x: norms * (1.001 if x.dtype == torch.float16 else 1),
    "in bfloat16": lambda norms, x: norms * (1.001 if x.dtype == torch.bfloat16 else 1),
    "in channels_last": lambda norms, x: norms * (1 if x.is_contiguous() else 1.001),
    "in large maps": lambda norms, x: norms * (1.001 if x.shape[-1] > 500 else 1),
    "in small maps": lambda norms, x: norms * (1.001 if x.shape[-1] < 8 else 1),
    "in many channels": lambda norms, x: norms * (1.001 if x.shape[1] > 16 else 1),
    "where nothing is negative": lambda norms, x: norms * (1 if (x < 0).any() else 1.001),
    "where anything is negative": lambda norms, x: norms * (1.001 if (x < 0).any() else 1),
    "not a number": lambda norms, x: norms * float("nan"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_kernel_that_differs_from_torch_is_replaced_by_it_with_the_reason(how, cpu, monkeypatch):
    x, right = torch.randn(2, 3, 5, 5), cpu.norms
    monkeypatch.setattr(cpu, "norms", lambda x, settings: WRONG[how](right(x, settings), x))
    with pytest.warns(RuntimeWarning, match="numba kernel failed, so torch computes") as said:
        norms = [atf(x), atf(x)]
    assert len(said) == 1
    torch.testing.assert_close(norms, [atf(x.double()).float()] * 2, rtol=1e-6, atol=0)
    assert kernels.backend().name == "torch"
    assert "numba failed: ArithmeticError: differs from torch by " in kernels.backend().reason


def test_k_in_float64_is_noticed(cpu):
    """Of 100 pixels, 0.29 are 29 in float32 and 28 in float64."""

    by_torch = atf_each.keywords["by_torch"]

    def wrong(x, settings):
        return by_torch(x.double(), settings)

    with pytest.raises(ArithmeticError, match=r"maps \[2, 3, 100\]"):
        compare(wrong, by_torch, cpu.TRIALS, torch.device("cpu"))


def test_a_kernel_is_compared_once(cpu, monkeypatch):
    calls, right = [], cpu.norms
    monkeypatch.setattr(cpu, "norms", lambda x, s: calls.append(x.shape) or right(x, s))
    for _ in range(3):
        atf(torch.randn(2, 3, 5, 5))
    assert calls[-3:] == [(2, 3, 25)] * 3
    assert len(calls) > 10
    atf(torch.randn(2, 3, 6, 6))
    assert calls[-2:] == [(2, 3, 25), (2, 3, 36)]
