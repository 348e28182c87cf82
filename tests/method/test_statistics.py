import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusenorm_openood import compute_id_statistics, normalise
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError, ZeroRangeError
from tests import document

SCORES = np.random.default_rng(0).normal(size=(3, 500)) * [[1], [10], [1e-4]]


@pytest.mark.parametrize(("low", "high"), [(0.1, 99.9), (1, 99.9), (0, 100)])
def test_statistics_are_those_of_the_published_function(low, high):
    s = compute_id_statistics(SCORES, low, high)
    expected = document.compute_id_statistics(SCORES, low, high)
    np.testing.assert_array_equal([s.mean, s.std, s.lower, s.upper], expected)


@given(arrays(np.float64, (2, 30), elements=st.floats(-1e6, 1e6), unique=True))
def test_percentiles_map_to_zero_and_one_and_the_order_is_kept(scores):
    z = normalise(scores, compute_id_statistics(scores, 0, 100))
    assert z.min() == 0
    assert z.max() == pytest.approx(1)
    assert (np.diff(z[0][np.argsort(scores[0])]) >= 0).all()


def test_half_precision_is_normalised_in_full_and_shift_and_scale_change_nothing():
    half = SCORES.astype(np.float16)
    full = half.astype(np.float64)
    z = normalise(half, compute_id_statistics(half))
    np.testing.assert_array_equal(z, normalise(full, compute_id_statistics(full)))
    moved, expected = 3 + 7 * SCORES, normalise(SCORES, compute_id_statistics(SCORES))
    z = normalise(moved, compute_id_statistics(moved))
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-6)


def test_a_constant_expert_is_refused_by_name():
    scores = np.vstack([SCORES[0], np.full(500, 2.5)])
    with pytest.raises(ZeroRangeError, match=r"'output' are both 2\.5.*leave this expert out"):
        compute_id_statistics(scores, names=["layer1", "output"])


@pytest.mark.parametrize("level", [0.1, 1.0, -30.0, 1e4])
def test_an_expert_that_is_constant_up_to_rounding_is_refused(level):
    rng = np.random.default_rng(0)
    rounded = np.float32(level) * (1 + np.float32(1.2e-7) * rng.integers(-2, 3, 500))
    with pytest.raises(ZeroRangeError, match="leave this expert out"):
        compute_id_statistics(rounded[None])
    narrow = level * (1 + 4e-5 * rng.random(500))  # ODIN's range at a temperature of 1000
    assert np.isfinite(compute_id_statistics(narrow[None]).upper).all()
    with pytest.raises(ZeroRangeError):  # of values a thousand times as large
        compute_id_statistics(narrow[None], scale=[1000 * abs(level)])


@pytest.mark.parametrize("shape", [(1, 500), (3, 500), (500,), (2, 5, 100)])
def test_scores_of_other_experts_are_not_broadcast(shape):
    statistics = compute_id_statistics(SCORES[:2])
    with pytest.raises(DataError, match="with 2 experts, as in the ID statistics, got shape"):
        normalise(np.zeros(shape), statistics)


def test_scores_that_are_not_finite_or_missing_are_refused():
    with pytest.raises(NonFiniteError, match=r"'expert 1' must be finite.* for 1"):
        compute_id_statistics(np.array([[0, 1.0], [0, np.nan]]))
    for scores in (np.zeros((2, 0)), np.zeros(5)):
        with pytest.raises(DataError, match=r"got shape"):
            compute_id_statistics(scores)


@pytest.mark.parametrize(
    ("low", "high", "named"),
    [(50, 50, "got 50"), (99, 1, "got 99"), (-1, 50, "low .* got -1"), (1, 101, "high .* got 101")],
)
def test_percentiles_out_of_order_are_refused(low, high, named):
    with pytest.raises(ConfigError, match=rf"percentile_.*{named}"):
        compute_id_statistics(SCORES, low, high)
