"""Conformal p-values: by brute force, by their law on real scores, and every error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fusenorm_openood.errors import CalibrationError, ConfigError, NonFiniteError
from fusenorm_openood.method.conformal import (
    conformal_p_values,
    fewest_rejections,
    guarantee,
    needed_images,
    rejects,
    rejects_at_fdr,
    threshold,
)

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(scores, scores, st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_p_values_count_ties_conservatively(conf, calibration, acceptance):
    expected = [(1 + sum(c <= x for c in calibration)) / (len(calibration) + 1) for x in conf]
    p = conformal_p_values(conf, calibration)
    np.testing.assert_array_equal(p, expected)
    assert (rejects(p, acceptance) >= rejects(p, (1 + acceptance) / 2)).all()


@pytest.mark.parametrize(("n", "ties"), [(50, False), (500, False), (200, True)])
def test_the_accepted_share_follows_the_beta_binomial_law(n, ties):
    """1,000 sets of calibration and test images."""
    generator, acceptance, tested = np.random.default_rng(0), 0.95, 200
    accepted, below = [], 0
    for _ in range(1000):
        drawn = generator.gamma(2.0, size=n + tested)
        drawn = drawn.round(1) if ties else drawn
        p = conformal_p_values(drawn[n:], drawn[:n])
        accepted.append(np.count_nonzero(~rejects(p, acceptance)))
        below += np.count_nonzero(p <= 0.1)
    k = int((1 - acceptance) * (n + 1))
    law = stats.betabinom(tested, n + 1 - k, k)
    mean, spread = law.mean(), law.std() / np.sqrt(1000)
    if ties:  # only more are accepted
        assert np.mean(accepted) > mean - 2.6 * spread
    else:
        assert abs(np.mean(accepted) - mean) < 2.6 * spread
        low, high = law.ppf([0.005, 0.995])
        assert np.mean((low <= np.array(accepted)) & (accepted <= high)) > 0.98
    assert below / (1000 * tested) < 0.1 + 2.6 * spread / tested  # super-uniform


def test_the_guarantee_is_the_law_of_the_accepted_share():
    found, generator = guarantee(200, 0.95, 0.9), np.random.default_rng(1)
    assert found.average == pytest.approx(1 - 10 / 201)
    # Uniform confidences: the share above the threshold, the 10th smallest, is 1 - threshold.
    shares = 1 - np.sort(generator.random((4000, 200)), axis=1)[:, 9]
    expected = np.quantile(shares, [0.05, 0.95])
    assert (found.low, found.high) == pytest.approx(expected, abs=0.002)
    assert found.uniform == pytest.approx(np.sqrt(np.log(20) / 400))
    assert "200 calibration images, 95.0% are accepted on average" in str(found)


def test_the_uniform_band_holds_for_all_acceptances_at_once():
    calibration = np.sort(np.random.default_rng(2).random((1000, 100)), axis=1)
    steps = np.arange(1, 101) / 100
    above, below = abs(calibration - steps), abs(calibration - steps + 1 / 100)
    missed = np.maximum(above, below).max(1) > guarantee(100, 0.9, 0.9).uniform
    assert missed.mean() < 0.1


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.95, 0.99])
def test_the_threshold_is_where_rejection_begins(acceptance):
    reference = np.sort(np.random.default_rng(0).normal(size=199))
    cut = threshold(reference, acceptance)
    p = conformal_p_values([np.nextafter(cut, -np.inf), cut], reference)
    assert rejects(p, acceptance).tolist() == [True, False]


def test_equal_to_one_minus_the_acceptance_is_rejected():
    assert rejects([0.1, 0.11], 0.9).tolist() == [True, False]
    for acceptance in (0.5, 0.9, 0.95, 0.99, 0.99000000005, 0.999):
        n = needed_images(acceptance)
        assert threshold(range(n), acceptance) == 0
        assert rejects(1 / (n + 1), acceptance)
        assert not rejects(1 / n, acceptance)


def test_rejections_at_a_false_discovery_rate():
    p = np.array([0.001, 0.02, 0.03, 0.5, 0.9])
    ranks = 0.1 * np.arange(1, 6) / 5
    expected = p <= max(p[p <= ranks], default=0)
    np.testing.assert_array_equal(rejects_at_fdr(p, 0.1), expected)
    assert rejects_at_fdr([], 0.1).shape == (0,)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.9", True])
def test_shares_outside_the_unit_interval_are_errors(value):
    for name, call in (
        ("acceptance", lambda: rejects([0.5], value)),
        ("acceptance", lambda: guarantee(10, value)),
        ("confidence", lambda: guarantee(10, 0.5, value)),
        ("rate", lambda: rejects_at_fdr([0.5], value)),
    ):
        with pytest.raises(ConfigError, match=rf"{name} must be .* in \(0, 1\).*, got"):
            call()


def test_too_few_calibration_images_are_an_error():
    with pytest.raises(CalibrationError, match="needs at least 99 calibration images, got 50"):
        guarantee(50, 0.99)


def test_confidences_that_are_not_finite_are_errors():
    with pytest.raises(NonFiniteError, match="conf must be finite"):
        conformal_p_values([np.nan], [1.0])
    with pytest.raises(NonFiniteError, match="calibration must be finite"):
        conformal_p_values([1.0], [np.inf])


@given(st.integers(1, 120), st.integers(1, 300), st.sampled_from([0.01, 0.05, 0.07, 0.29, 0.5]))
def test_fewest_rejections_at_a_false_discovery_rate(n, tested, rate):
    def possible(k):
        return rejects_at_fdr([1 / (n + 1)] * k + [1] * (tested - k), rate).any()

    fewest = fewest_rejections(n, tested, rate)
    assert fewest > tested or possible(fewest)
    assert not possible(min(fewest - 1, tested))
