import numpy as np
import pytest
from fusenorm_openood.forward.thresholds import ActivationSample
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusenorm_openood import compute_id_statistics, normalise
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError, ZeroRangeError
from fusenorm_openood.method.statistics import standardise

SCORES = np.random.default_rng(0).normal(size=(3, 500)) * [[1], [10], [1e-4]]


def test_statistics_equal_numpys():
    s = compute_id_statistics(SCORES, 1, 99.9)
    np.testing.assert_array_equal(s.mean, SCORES.mean(axis=1))
    np.testing.assert_array_equal(s.std, SCORES.std(axis=1) + 1e-8)
    np.testing.assert_array_equal(s.lower, [np.percentile(row, 1) for row in SCORES])
    np.testing.assert_array_equal(s.upper, [np.percentile(row, 99.9) for row in SCORES])


@given(arrays(np.float64, (2, 30), elements=st.floats(-1e6, 1e6), unique=True))
def test_percentiles_map_to_zero_and_one_and_the_order_is_kept(scores):
    z = normalise(scores, compute_id_statistics(scores, 0, 100))
    assert z.min() == 0
    assert z.max() == pytest.approx(1)
    assert (np.diff(z[0][np.argsort(scores[0])]) >= 0).all()


def test_half_precision_is_normalised_in_full():
    half = SCORES.astype(np.float16)
    full = half.astype(np.float64)
    z = normalise(half, compute_id_statistics(half))
    np.testing.assert_array_equal(z, normalise(full, compute_id_statistics(full)))


def test_normalisation_ignores_shift_and_scale():
    moved = 3 + 7 * SCORES
    np.testing.assert_allclose(
        normalise(moved, compute_id_statistics(moved)),
        normalise(SCORES, compute_id_statistics(SCORES)),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_constant_expert_is_rejected_by_name():
    scores = np.vstack([SCORES[0], np.full(500, 2.5)])
    with pytest.raises(ZeroRangeError, match=r"'output' are both 2\.5.*leave this expert out"):
        compute_id_statistics(scores, names=["layer1", "output"])


@pytest.mark.parametrize("level", [0.1, 1.0, -30.0, 1e4])
def test_an_expert_that_is_constant_up_to_rounding_is_rejected(level):
    rng = np.random.default_rng(0)
    rounded = np.float32(level) * (1 + np.float32(1.2e-7) * rng.integers(-2, 3, 500))
    with pytest.raises(ZeroRangeError, match="leave this expert out"):
        compute_id_statistics(rounded[None])
    narrow = level * (1 + 4e-5 * rng.random(500))  # ODIN's range at a temperature of 1000
    assert np.isfinite(compute_id_statistics(narrow[None]).upper).all()


@pytest.mark.parametrize("shape", [(1, 500), (3, 500), (500,), (2, 5, 100)])
def test_scores_of_other_experts_are_not_broadcast(shape):
    statistics = compute_id_statistics(SCORES[:2])
    with pytest.raises(DataError, match="with 2 experts, as in the ID statistics, got shape"):
        normalise(np.zeros(shape), statistics)


def test_non_finite_scores_are_rejected_by_name():
    with pytest.raises(
        NonFiniteError, match="'expert 1' must be finite, got NaN or infinity for 1"
    ):
        compute_id_statistics(np.array([[0, 1.0], [0, np.nan]]))


@pytest.mark.parametrize("scores", [np.zeros((2, 0)), np.zeros(5)])
def test_scores_without_images_are_rejected(scores):
    with pytest.raises(DataError, match=r"shape"):
        compute_id_statistics(scores)


@pytest.mark.parametrize(("low", "high"), [(50, 50), (99, 1), (-1, 50), (1, 101)])
def test_percentiles_out_of_order_are_rejected(low, high):
    with pytest.raises(ConfigError, match=f"got percentile_low={low} and"):
        compute_id_statistics(SCORES, low, high)


def test_activation_sample_is_exact_up_to_its_limit():
    features = np.random.default_rng(1).normal(size=(97, 8)).astype(np.float32)
    sample = ActivationSample(limit=97 * 8)
    assert sample.is_empty
    for part in np.array_split(features, 7):
        sample.update(part)
    assert sample.percentile(90) == pytest.approx(np.percentile(features, 90), rel=1e-7)


def test_activation_sample_is_even_and_bounded_beyond_its_limit():
    features = np.repeat(np.arange(5000, dtype=np.float32)[:, None], 3, axis=1)
    sample = ActivationSample(limit=900)
    for part in np.array_split(features, 113):
        sample.update(part)
        assert sum(kept.size for kept in sample._kept) <= 900
    kept = np.concatenate(sample._kept)[:, 0]
    assert len(set(np.diff(kept))) == 1  # every s-th image, across all batches
    assert sample.percentile(90) == pytest.approx(4500, rel=0.01)


def test_activation_sample_keeps_an_image_larger_than_its_limit():
    sample = ActivationSample(limit=2)
    sample.update(np.ones((3, 5), dtype=np.float32))
    assert sample.percentile(50) == 1


def test_activation_sample_without_images_is_an_error():
    with pytest.raises(DataError, match="needs at least one ID image"):
        ActivationSample().percentile(90)


@pytest.mark.parametrize("clip", [False, True])
def test_standardised_id_scores_have_mean_0_and_deviation_1_and_the_clip_is_at_the_top(clip):
    statistics = compute_id_statistics(SCORES, 5, 95)
    u = standardise(SCORES, statistics, clip)
    above = statistics.upper[:, None] < SCORES
    plain = (SCORES - SCORES.mean(1, keepdims=True)) / SCORES.std(1, keepdims=True)
    np.testing.assert_allclose(u[~above], plain[~above], rtol=1e-3)
    if not clip:
        np.testing.assert_allclose([u.mean(1), u.std(1)], [[0] * 3, [1] * 3], atol=1e-3)
        return
    for row, old, top in zip(u, plain, above, strict=True):
        assert len(np.unique(row[top])) == 1
        assert row[~top].max() <= row[top][0] < old[top].min()
    with pytest.raises(DataError, match="with 3 experts"):
        standardise(SCORES[:2], statistics, clip)
