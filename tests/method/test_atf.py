"""ATF against a float64 oracle and the published function, in every backend."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusenorm_openood
from fusenorm_openood.errors import ConfigError, TapError
from fusenorm_openood.method.atf import FeatureNorm, atf_each, atf_map
from tests.conftest import forced_backend
from tests.document import adaptive_topk_channel_weight
from tests.oracle import assert_atf_close, atf_oracle

SIZES = [(1, 1), (1, 2), (1, 7), (2, 2), (3, 5), (16, 9), (32, 32), (64, 64)]
KINDS = [
    *("normal", "relu", "half", "sparse", "constant", "constants", "nearly", "zero", "dead"),
    *("huge", "tiny", "mixed"),
]
layout = torch.contiguous_format


@pytest.fixture(params=["torch", "numba", "numba-tiles", "triton"], autouse=True, scope="module")
def backend(request):
    """Every backend, numba's rows and its tiles."""
    global layout
    name, _, tiles = request.param.partition("-")
    layout = torch.channels_last if tiles else torch.contiguous_format
    with forced_backend(name):
        yield name


@pytest.fixture
def fast(backend):
    """Triton's interpreter is slow: the other tests are enough for it."""
    if backend == "triton":
        pytest.skip("slow in Triton's interpreter")


on_fast_backends = pytest.mark.usefixtures("fast")


def atf(x: torch.Tensor, **chosen: float) -> torch.Tensor:
    if x.ndim == 4:
        x = x.contiguous(memory_format=layout)
    return fusenorm_openood.atf(x.to(device()), **chosen).cpu()


def device() -> str:
    on_cuda = os.environ["FUSENORM_KERNEL"] == "triton" and torch.cuda.is_available()
    return "cuda" if on_cuda else "cpu"


def maps(kind: str, height: int, width: int, batch: int = 3, channels: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    x = torch.randn(batch, channels, height, width, generator=generator)
    ramp = torch.linspace(0.1, 3, channels).view(1, -1, 1, 1)
    if kind == "relu":
        return x.relu()
    if kind == "half":
        return torch.cat([x[:, : channels // 2].relu(), x[:, channels // 2 :]], dim=1)
    if kind == "sparse":
        return x * (torch.rand(x.shape, generator=generator) > 0.97)
    if kind == "constant":
        return torch.full_like(x, 0.7)
    if kind == "constants":
        return ramp.expand_as(x).clone()
    if kind == "nearly":
        return ramp * (1 + 1e-3 * x)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "dead":
        return x * (torch.arange(channels) % 2).view(1, -1, 1, 1)
    if kind == "huge":
        return x * 1e30
    if kind == "tiny":
        return x * 1e-30
    if kind == "mixed":
        return x * torch.logspace(-12, 12, channels).view(1, -1, 1, 1)
    return x


def test_equals_the_oracle_in_float32(backend):
    # For Triton, sides that are no powers of two, and a map that takes several tiles.
    sizes, batch = ([(3, 5)], 1) if backend == "triton" else (SIZES, 3)
    changes = {"k_min": 0.05, "k_max": 0.2, "alpha": 0.5}
    for size in sizes:
        x = torch.cat([maps(kind, *size, batch) for kind in KINDS])
        for chosen in ({}, changes, {"k_min": 1.0, "k_max": 1.0}):
            assert_atf_close(atf(x, **chosen), x.numpy(), rtol=1e-5, **chosen)
    for shape in ((2, 130, 3, 3), (1, 3, 128, 128), (1, 2, 32, 32)):
        if backend != "triton" or shape[-1] == 32:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
            assert_atf_close(atf(x, **changes), x.numpy(), rtol=1e-5, **changes)


def test_equals_the_published_function_where_k_does_not_depend_on_the_entropy(backend):
    """Equal fractions in percent, down to the rounding of their products with N."""
    sides, percents = [4, 7, 10, 14, 28, 32], range(1, 101)
    if backend == "triton":
        sides, percents = [10], range(28, 31)
    for side in sides:
        x = maps("normal", side, side, batch=1)
        chosen = [FeatureNorm(k / 100, k / 100, alpha=1.0) for k in percents]
        found = atf_each(x.contiguous(memory_format=layout).to(device()), chosen).T.cpu()
        expected = torch.stack([adaptive_topk_channel_weight(x, *each) for each in chosen])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@on_fast_backends
def test_equals_the_published_function_where_k_depends_on_the_entropy():
    """Where one rounds h N to another side of an integer than the other, k is one apart."""
    x = torch.cat([maps(kind, 16, 9) for kind in ("normal", "relu", "sparse", "dead")])
    for chosen in ({}, {"k_min": 0.05, "k_max": 0.2, "alpha": 0.5}):
        expected = adaptive_topk_channel_weight(x, **chosen)
        torch.testing.assert_close(atf(x, **chosen), expected, rtol=1e-4, atol=0)


def test_k_of_29_percent_of_100_pixels_is_29_in_float32_and_28_in_float64():
    x = maps("normal", 10, 10)
    energy = x.flatten(2).square().sort(descending=True).values
    for dtype, k in (torch.float32, 29), (torch.float64, 28):
        expected = energy[..., :k].mean(-1).sqrt().mean(-1).to(dtype)
        found = atf(x.to(dtype), k_min=0.29, k_max=0.29, alpha=1.0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_half_precision_is_computed_in_full_and_float64_stays_float64():
    x = torch.cat([maps(k, 3, 5, 1) for k in ("normal", "sparse", "constants", "zero", "dead")])
    for dtype in (torch.float16, torch.bfloat16):
        norms = atf(x.to(dtype))
        assert norms.dtype == torch.float32
        assert_atf_close(norms, x.to(dtype).float().numpy(), rtol=1e-5)
    norms = atf(x[:1].double())
    assert norms.dtype == torch.float64
    np.testing.assert_allclose(norms, atf_oracle(x[:1].double())[0], rtol=1e-12)
    assert torch.isfinite(atf(torch.full((1, 2, 8, 8), 65504.0, dtype=torch.float16))).all()


def test_equals_the_oracle_for_any_shape_and_settings(backend):
    @settings(max_examples=2 if backend == "triton" else 40)
    @given(
        shape=st.tuples(*[st.integers(1, n) for n in (3, 40, 26, 26)]),
        k=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
        alpha=st.floats(0, 1),
        kind=st.sampled_from(["normal", "relu", "sparse", "constants", "nearly", "dead"]),
    )
    def check(shape, k, alpha, kind):
        batch, channels, *size = shape
        channels, batch = (min(channels, 3), 1) if backend == "triton" else (channels, batch)
        x = maps(kind, *size, batch=batch, channels=channels)
        chosen = {"k_min": k[0], "k_max": k[1], "alpha": alpha}
        assert_atf_close(atf(x, **chosen), x.numpy(), rtol=1e-5, **chosen)

    check()


@on_fast_backends
def test_pixel_order_channel_order_batch_size_sign_and_memory_format_change_nothing(monkeypatch):
    generator, close = torch.Generator().manual_seed(0), torch.testing.assert_close
    x = torch.randn(5, 4, 6, 7, generator=generator)
    norms = atf(x)
    pixels = torch.randperm(42, generator=generator)
    close(atf(x.flatten(2)[:, :, pixels].view_as(x)), norms)
    close(atf(x[:, torch.randperm(4, generator=generator)]), norms)
    close(atf(-x), norms)
    for batch in (1, 2, 3):
        close(torch.cat([atf(part) for part in x.split(batch)]), norms)
    wide = torch.randn(5, 4, 6, 14)
    wide[..., ::2] = x
    strange = x.transpose(2, 3).contiguous().transpose(2, 3)
    for y in (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2], strange):
        close(fusenorm_openood.atf(y), norms)
    monkeypatch.setattr("fusenorm_openood.method.atf.IN_CACHE", 2 * x[0].numel())  # in parts
    close(atf(x), norms)


def test_several_settings_at_once_are_those_of_each():
    x = maps("relu", 7, 4, batch=2).to(device())
    chosen = [FeatureNorm(), FeatureNorm(alpha=0.5), FeatureNorm(0.3, 1.0, eps=1e-4)]
    norms = atf_each(x, chosen).T
    assert norms.shape == (3, 2)
    for row, setting in zip(norms, chosen, strict=True):
        torch.testing.assert_close(row, fusenorm_openood.atf(x, *setting))


@on_fast_backends
def test_equal_magnitudes_count_once_each():
    x = torch.randint(0, 4, (3, 5, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    assert_atf_close(atf(x), x.numpy(), rtol=1e-5)


@on_fast_backends
@pytest.mark.parametrize("eps", [1e-300, 1e-38, 1e-12, 1e-2, 100.0])
def test_eps_of_any_size(eps):
    assert_atf_close(atf(maps("relu", 8, 8), eps=eps), maps("relu", 8, 8).numpy(), 1e-5, eps=eps)


def test_gradient_flows_where_it_is_asked_for():
    x = maps("normal", 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(fusenorm_openood.atf(x).sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_has_no_norm_and_spoils_no_other(bad):
    x = maps("normal", 4, 4)
    copy, norms = x.clone(), atf(x)
    assert torch.equal(x, copy)  # the input is unmodified
    x[1, 2, 3, 3] = bad
    spoilt = atf(x)
    assert spoilt[1].isnan()
    assert torch.equal(spoilt[[0, 2]], norms[[0, 2]])
    assert atf(x[:0]).shape == (0,)


@on_fast_backends
def test_heat_maps_add_up_to_the_norms_and_lie_where_the_energy_is():
    x, chosen = maps("relu", 8, 8), {"k_min": 0.1, "k_max": 0.3, "alpha": 0.5}
    x[0, :, 5:] = 0
    heat = atf_map(x, **chosen)
    assert heat.shape == (3, 8, 8)
    torch.testing.assert_close(heat.sum((1, 2)).float(), atf(x, **chosen))
    assert (heat >= 0).all()
    assert heat[0, 5:].eq(0).all()


@on_fast_backends
@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"k_min": 0.3, "k_max": 0.2}, "k_min must be <= k_max, got 0.3"),
        ({"k_min": 0.0}, r"k_min must be .* in \(0, 1\], got 0.0"),
        ({"alpha": -0.1}, r"alpha must be .* in \[0, 1\], got -0.1"),
        ({"eps": 0.0}, "eps must be .* > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_named(chosen, named):
    with pytest.raises(ConfigError, match=named):
        atf(torch.randn(1, 2, 3, 3), **chosen)


@on_fast_backends
@pytest.mark.parametrize(
    "x", [torch.randn(2, 3), torch.randn(2, 3, 0, 4), torch.ones(1, 2, 3, 3, dtype=torch.int64)]
)
def test_what_is_no_feature_map_is_refused(x):
    with pytest.raises(TapError, match=r"\[B, C, H, W\]"):
        atf(x)
