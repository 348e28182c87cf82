import numpy as np
import pytest
import torch
from fusenorm_openood.method.experts import (
    check_output_expert,
    energy,
    log_odds,
    mls,
    msp,
    odin_perturb,
    score_logits,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from fusenorm_openood.errors import ConfigError

LOGITS = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1000.0])
def test_scores_equal_scipys(temperature):
    x = LOGITS.numpy() / temperature
    p = softmax(x, axis=1).max(axis=1)
    np.testing.assert_allclose(msp(LOGITS, temperature), p, rtol=1e-12)
    np.testing.assert_allclose(log_odds(LOGITS, temperature), np.log(p / (1 - p)), rtol=1e-6)
    np.testing.assert_allclose(energy(LOGITS, temperature), temperature * logsumexp(x, axis=1))
    np.testing.assert_array_equal(mls(LOGITS), LOGITS.numpy().max(axis=1))


def test_log_odds_still_rank_where_the_probability_saturates():
    logits = torch.tensor([[100.0, 0, 0], [200.0, 0, 0], [300.0, 0, 0]])
    assert (msp(logits) == 1).all()
    assert (log_odds(logits).diff() > 0).all()
    assert torch.isfinite(log_odds(logits)).all()


@given(st.floats(-50, 50))
def test_log_odds_grow_with_the_margin_between_two_classes(margin):
    a, b = torch.tensor([[margin, 0.0]]), torch.tensor([[abs(margin) + 1, 0.0]])
    assert log_odds(a) < log_odds(b)


def test_scores_inside_the_fusion_are_float64():
    for name in ("msp", "mls", "energy", "odin"):
        assert score_logits(name, LOGITS.half(), 1.0).dtype == torch.float64
    # At T = 1000, float32 probabilities of close logits tie; these scores do not.
    close = torch.tensor([[1.0, 0.0], [1.00001, 0.0], [1.00002, 0.0]])
    assert len(msp(close.float(), 1000).unique()) < 3
    assert len(score_logits("odin", close, 1000).unique()) == 3


def test_odin_perturbs_every_pixel_towards_the_predicted_class():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 4))
    images = torch.randn(6, 3, 3, 3, requires_grad=True)
    logits = net(images)
    moved = odin_perturb(images, logits, 1000.0, 0.01)
    assert not moved.requires_grad
    torch.testing.assert_close((moved - images).abs(), torch.full_like(images, 0.01).detach())
    before, after = logits.softmax(1).amax(1), net(moved).softmax(1).amax(1)
    assert (after > before).all()
    assert all(p.grad is None for p in net.parameters())
    assert images.grad is None


def test_odins_gradient_survives_half_precision():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 4))
    images = torch.randn(6, 3, 3, 3)
    steps = []
    for dtype in (torch.float32, torch.float16):
        leaf = images.to(dtype).requires_grad_()
        moved = odin_perturb(leaf, net.to(dtype)(leaf), 1000.0, 0.01)
        assert moved.dtype == dtype
        steps.append((moved - leaf).sign().float())
    assert (steps[0] == steps[1]).float().mean() > 0.99


def test_odin_divides_its_step_by_the_channels_standard_deviation():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    images = torch.randn(2, 3, 2, 2, requires_grad=True)
    moved = odin_perturb(images, net(images), 1000.0, 0.01, (0.1, 0.2, 0.5))
    steps = (moved - images).abs()[0, :, 0, 0].tolist()
    assert steps == pytest.approx([0.1, 0.05, 0.02], rel=1e-4)
    with pytest.raises(ConfigError, match="2 entries for images with 3 channels"):
        odin_perturb(images, net(images), input_std=(1.0, 1.0))


def test_unknown_experts_are_rejected():
    with pytest.raises(ConfigError, match="'entropy': choose from msp, mls, energy, odin"):
        check_output_expert("entropy")
