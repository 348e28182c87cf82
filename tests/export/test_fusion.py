"""The fusion in torch against the fusion in numpy, for drawn scores."""

import numpy as np
import pytest
import torch

from fusenorm_openood.export.fusion import Fusion, Roles, p_values
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.method.fusion import fuse, mean_of_strong
from fusenorm_openood.method.joint import far_off, joint_penalty, joint_statistics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.statistics import compute_id_statistics, normalise, standardise

TAPS, STRONG = [0, 1, 2, 3], [2, 4, 5]  # the third tap and two other experts
WEAK = [0, 1, 3]


def drawn(count: int, spread: float, seed: int) -> np.ndarray:
    """Scores `[6, N]`, those of the taps positive."""
    scores = np.random.default_rng(seed).normal(size=(6, count)) * spread
    scores[TAPS] = np.exp(scores[TAPS])
    return scores


def fused(settings, statistics, joint, scores, roles=None) -> np.ndarray:
    fusion = Fusion(settings, roles or Roles(STRONG, WEAK, TAPS), statistics, joint)
    return fusion(torch.from_numpy(scores)).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": False, "base": 20.0, "percentile_low": 1.0, "percentile_high": 99.9},
        {"weights": (1.0, 0.0, 3.0)},
        {"base": 1.0},
        {"cap": 0.0},
        {"base": 1.5, "cap": 40.0},
    ],
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_deviation_penalty(changes, spread):
    s = Settings(strong=("a", "b", "c")).replace(**changes)
    statistics = compute_id_statistics(drawn(80, 1, 0), s.percentile_low, s.percentile_high)
    scores = drawn(50, spread, 1)
    z = normalise(scores, statistics)
    strong = np.minimum(z[STRONG], 1) if s.clip else z[STRONG]
    expected = fuse(strong, z[WEAK], s.weights, s.base, s.cap)
    np.testing.assert_allclose(fused(s, statistics, None, scores), expected, rtol=1e-12, atol=1e-12)
    joint = joint_statistics(drawn(80, 1, 0)[TAPS])
    beyond = far_off(scores[TAPS], joint)
    assert (beyond > 0).any() == (spread > 1)
    found = fused(s, statistics, joint, scores)
    np.testing.assert_allclose(found, expected - s.cap * beyond, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("dead", [None, 1])
@pytest.mark.filterwarnings("ignore:left out of the joint distance")
def test_joint_penalty(clip, dead):
    s = Settings.joint(clip=clip, joint_weight=0.7)
    known, scores = drawn(80, 1, 0), drawn(50, 3, 1)
    if dead is not None:
        known[dead] = scores[dead] = 0
    joint = joint_statistics(known[TAPS])
    statistics = compute_id_statistics(known[STRONG], s.percentile_low, s.percentile_high)
    z = standardise(scores[STRONG], statistics, clip)
    expected = mean_of_strong(z) - 0.7 * joint_penalty(scores[TAPS], joint)
    found = fused(s, statistics, joint, scores)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_all_taps_strong():
    s = Settings(strong=("a", "b", "c"))
    statistics = compute_id_statistics(drawn(80, 1, 0), 5, 95)
    scores = drawn(50, 1, 1)
    strong = list(range(6))
    expected = np.minimum(normalise(scores, statistics), 1).mean(0)
    found = fused(s, statistics, None, scores, Roles(strong, [], TAPS))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_score_that_is_not_finite_gives_nan_and_the_smallest_p_value():
    statistics = compute_id_statistics(drawn(80, 1, 0), 5, 95)
    scores = drawn(4, 1, 1)
    scores[0, 1], scores[4, 2] = np.nan, np.inf
    conf = fused(Settings(), statistics, None, scores)
    assert np.isnan(conf).tolist() == [False, True, True, False]
    p = p_values(torch.from_numpy(conf), torch.linspace(-50, 50, 19, dtype=torch.float64))
    assert p[[1, 2]].tolist() == [0.05, 0.05]


def test_p_values_with_ties():
    rng = np.random.default_rng(0)
    conf, calibration = rng.integers(0, 9, 200) / 3, np.sort(rng.integers(0, 9, 30) / 3)
    found = p_values(torch.from_numpy(conf), torch.from_numpy(calibration))
    np.testing.assert_array_equal(found.numpy(), conformal_p_values(conf, calibration))


def test_roles():
    roles = Roles.of(("a", "b", "c", "output", "mds"), ("a", "b", "c"), ("output", "b"))
    assert roles == Roles([3, 1], [0, 2], [0, 1, 2])
