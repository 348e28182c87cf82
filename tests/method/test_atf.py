import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusenorm_openood
from fusenorm_openood.errors import ConfigError, TapError
from fusenorm_openood.method.atf import FeatureNorm, atf_each
from tests.conftest import forced_backend
from tests.document import adaptive_topk_channel_weight
from tests.oracle import assert_atf_close, atf_oracle

SIZES = [(1, 1), (1, 2), (1, 7), (2, 2), (3, 5), (8, 8), (16, 9), (32, 32), (64, 64)]
KINDS = [
    "normal",
    "relu",
    "half",
    "sparse",
    "constant",
    "constants",
    "nearly",
    "zero",
    "dead",
    "huge",
    "tiny",
    "mixed",
]


# Triton's interpreter is slow: the smallest map, one whose sides are no powers of two, and one that
# takes several tiles.
SIZES_OF_TRITON = [(2, 2), (3, 5), (32, 32)]

layout = torch.contiguous_format


@pytest.fixture(params=["torch", "numba", "numba-tiles", "triton"], autouse=True, scope="module")
def backend(request):
    """Every test of this file holds for every backend, numba's rows and its tiles."""
    global layout
    name, _, tiles = request.param.partition("-")
    layout = torch.channels_last if tiles else torch.contiguous_format
    with forced_backend(name):
        yield name


def atf(x: torch.Tensor, **chosen: float) -> torch.Tensor:
    if x.ndim == 4:
        x = x.contiguous(memory_format=layout)
    return fusenorm_openood.atf(x.to(device()), **chosen).cpu()


def device() -> str:
    on_cuda = os.environ["FUSENORM_KERNEL"] == "triton" and torch.cuda.is_available()
    return "cuda" if on_cuda else "cpu"


def examples(count: int, backend: str) -> settings:
    """How many examples hypothesis draws: few in Triton's interpreter."""
    return settings(max_examples=3 if backend == "triton" else count, deadline=None)


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


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_oracle_in_float32(kind, backend):
    sizes, batch = (SIZES_OF_TRITON, 1) if backend == "triton" else (SIZES, 3)
    for size in sizes:
        x = maps(kind, *size, batch)
        assert_atf_close(atf(x), x.numpy(), rtol=1e-5)
        for chosen in ({"k_min": 0.05, "k_max": 0.2, "alpha": 0.5}, {"k_min": 1.0, "k_max": 1.0}):
            assert_atf_close(atf(x, **chosen), x.numpy(), rtol=1e-5, **chosen)


def test_equals_the_document_where_k_does_not_depend_on_the_entropy(backend):
    """Equal fractions in percent, down to the rounding of their products with N."""
    sides, percents = [4, 7, 10, 14, 28, 32], range(1, 101)
    if backend == "triton":
        sides, percents = [10], range(25, 35)
    for side in sides:
        x = maps("normal", side, side)
        chosen = [FeatureNorm(k / 100, k / 100, alpha=1.0) for k in percents]
        found = atf_each(x.contiguous(memory_format=layout).to(device()), chosen).cpu()
        expected = torch.stack([adaptive_topk_channel_weight(x, *each) for each in chosen])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_equals_the_document_where_k_depends_on_the_entropy():
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
        torch.testing.assert_close(atf(x.to(dtype), k_min=0.29, k_max=0.29, alpha=1.0), expected,
                                   rtol=1e-5, atol=0)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "relu", "sparse", "constants", "zero", "dead"])
def test_half_precision_is_computed_in_full(dtype, kind):
    x = maps(kind, 16, 9).to(dtype)
    norms = atf(x)
    assert norms.dtype == torch.float32
    assert torch.isfinite(norms).all()
    assert_atf_close(norms, x.float().numpy(), rtol=1e-5)


def test_half_precision_at_its_largest_value_is_finite():
    assert torch.isfinite(atf(torch.full((1, 2, 8, 8), 65504.0, dtype=torch.float16))).all()


def test_float64_stays_float64():
    x = maps("normal", 8, 8).double()
    norms = atf(x)
    assert norms.dtype == torch.float64
    np.testing.assert_allclose(norms, atf_oracle(x)[0], rtol=1e-12)


def test_equals_the_oracle_everywhere(backend):
    @examples(60, backend)
    @given(
        shape=st.tuples(*[st.integers(1, n) for n in (4, 5, 12, 12)]),
        k=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
        alpha=st.floats(0, 1),
        seed=st.integers(0, 2**31),
    )
    def check(shape, k, alpha, seed):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()
        chosen = {"k_min": k[0], "k_max": k[1], "alpha": alpha}
        assert_atf_close(atf(x, **chosen), x.numpy(), rtol=1e-5, **chosen)

    check()


def test_pixel_order_channel_order_batch_size_and_sign_change_nothing(backend):
    @examples(12, backend)
    @given(seed=st.integers(0, 2**31), batch=st.integers(1, 5))
    def check(seed, batch):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, 4, 6, 7, generator=generator)
        norms = atf(x)
        pixels = torch.randperm(42, generator=generator)
        torch.testing.assert_close(atf(x.flatten(2)[:, :, pixels].view_as(x)), norms)
        torch.testing.assert_close(atf(x[:, torch.randperm(4, generator=generator)]), norms)
        torch.testing.assert_close(atf(-x), norms)
        torch.testing.assert_close(torch.cat([atf(part) for part in x.split(batch)]), norms)

    check()


def test_memory_format_changes_nothing():
    x = maps("relu", 16, 9).to(device())
    norms = fusenorm_openood.atf(x)
    wide = torch.randn(3, 6, 16, 18, device=device())
    wide[..., ::2] = x
    for y in (
        x.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        torch.testing.assert_close(fusenorm_openood.atf(y), norms)


def test_several_settings_at_once_are_those_of_each():
    x = maps("relu", 16, 9).to(device())
    chosen = [FeatureNorm(), FeatureNorm(alpha=0.5), FeatureNorm(0.3, 1.0, eps=1e-4)]
    norms = atf_each(x, chosen)
    assert norms.shape == (3, 3)
    for row, setting in zip(norms, chosen, strict=True):
        torch.testing.assert_close(row, fusenorm_openood.atf(x, *setting))


def test_many_channels_and_pixels_make_several_tiles():
    for shape in ((2, 130, 3, 3), (1, 3, 128, 128)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
        assert_atf_close(atf(x), x.numpy(), rtol=1e-5)


def test_equals_the_oracle_for_any_number_of_channels_and_pixels(backend):
    @examples(25, backend)
    @given(
        channels=st.integers(1, 40),
        size=st.tuples(st.integers(1, 26), st.integers(1, 26)),
        k=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
        kind=st.sampled_from(["normal", "relu", "sparse", "constants", "nearly", "dead"]),
    )
    def check(channels, size, k, kind):
        x = maps(kind, *size, batch=2, channels=channels)
        chosen = {"k_min": k[0], "k_max": k[1]}
        assert_atf_close(atf(x, **chosen), x.numpy(), rtol=1e-5, **chosen)

    check()


def test_a_batch_larger_than_the_cache_is_computed_in_parts(monkeypatch):
    x = maps("relu", 8, 8, batch=5)
    norms = atf(x, alpha=0.5)
    monkeypatch.setattr("fusenorm_openood.method.atf.IN_CACHE", 2 * x[0].numel())
    torch.testing.assert_close(atf(x, alpha=0.5), norms)


def test_equal_magnitudes_count_once_each():
    x = torch.randint(0, 4, (3, 5, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    assert_atf_close(atf(x), x.numpy(), rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-300, 1e-38, 1e-12, 1e-2, 100.0])
def test_eps_of_any_size(eps):
    assert_atf_close(atf(maps("relu", 8, 8), eps=eps), maps("relu", 8, 8).numpy(), 1e-5, eps=eps)


def test_settings_may_be_integers():
    x = maps("relu", 8, 8)
    whole = {"k_min": 1, "k_max": 1, "alpha": 1, "eps": 1}
    assert_atf_close(atf(x, **whole), x.numpy(), 1e-5, **whole)


def test_gradient_flows_where_it_is_asked_for():
    x = maps("normal", 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(fusenorm_openood.atf(x).sum(), x)
    assert gradient.abs().sum() > 0


def test_input_is_unmodified_and_an_empty_batch_is_empty():
    x = maps("normal", 8, 8)
    copy = x.clone()
    atf(x)
    assert torch.equal(x, copy)
    assert atf(x[:0]).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_has_no_norm_and_spoils_no_other(bad):
    x = maps("normal", 8, 8)
    norms = atf(x)
    x[1, 2, 3, 4] = bad
    spoilt = atf(x)
    assert spoilt[1].isnan()
    assert torch.equal(spoilt[[0, 2]], norms[[0, 2]])


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"k_min": 0.3, "k_max": 0.2}, "k_min = 0.3"),
        ({"k_min": 0.0}, "k_min = 0.0"),
        ({"k_max": 1.5}, "k_max = 1.5"),
        ({"k_min": float("nan")}, "k_min = nan"),
        ({"alpha": -0.1}, "alpha = -0.1"),
        ({"alpha": 1.1}, "alpha = 1.1"),
        ({"eps": 0.0}, "eps = 0.0"),
    ],
)
def test_settings_out_of_range_are_named(chosen, named):
    with pytest.raises(ConfigError, match=named):
        atf(torch.randn(1, 2, 3, 3), **chosen)


@pytest.mark.parametrize(
    "x", [torch.randn(2, 3), torch.randn(2, 3, 0, 4), torch.ones(1, 2, 3, 3, dtype=torch.int64)]
)
def test_what_is_no_feature_map_is_refused(x):
    with pytest.raises(TapError, match=r"\[B, C, H, W\]"):
        atf(x)
