import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusenorm_openood import fuse
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.method.fusion import deviation, penalty

Z = arrays(np.float64, (3, 20), elements=st.floats(-3, 4))


def fuse_by_hand(strong, weak, base=20.0, cap=1.0):
    """The formula, applied one image at a time."""
    fused = []
    for i in range(strong.shape[1]):
        largest = max([0.0, *(max(-z, z - 1) for z in weak[:, i])])
        fused.append(strong[:, i].mean() - min(cap, base**largest - 1))
    return fused


@given(Z, Z)
def test_equals_the_formula(strong, weak):
    np.testing.assert_allclose(fuse(strong, weak), fuse_by_hand(strong, weak), atol=1e-12)


@given(Z, Z, st.floats(1, 100), st.floats(0, 10))
def test_equals_the_formula_for_any_base_and_cap(strong, weak, base, cap):
    np.testing.assert_allclose(
        fuse(strong, weak, base=base, cap=cap), fuse_by_hand(strong, weak, base, cap), atol=1e-9
    )


@given(Z)
def test_weak_experts_only_lower(weak):
    p = penalty(weak)
    assert ((p >= 0) & (p <= 1)).all()
    inside = ((weak >= 0) & (weak <= 1)).all(axis=0)
    assert (p[inside] == 0).all()
    assert (penalty(weak[:1]) <= p).all()


def test_deviation_is_the_distance_to_the_unit_interval():
    np.testing.assert_allclose(deviation([-0.5, 0, 0.3, 1, 1.25]), [0.5, 0, 0, 0, 0.25])


def test_without_weak_experts_nothing_is_subtracted():
    np.testing.assert_array_equal(fuse([[1.0, 2.0]], np.empty((0, 2))), [1, 2])


def test_weights_are_scaled_to_sum_to_one():
    strong = np.array([[0.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(fuse(strong, np.empty((0, 2)), weights=[3, 1]), [0.25, 0.75])
    np.testing.assert_allclose(fuse(strong, np.empty((0, 2)), weights=[0, 9]), [1, 0])


def test_large_deviations_do_not_overflow():
    for base in (1.5, 2, 20):
        assert fuse([[0.5]], [[1e300]], base=base) == pytest.approx(-0.5)


def test_half_precision_is_fused_in_full():
    z = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float16)
    fused = fuse(z[:1], z[1:])
    assert fused.dtype == np.float64
    np.testing.assert_array_equal(fused, fuse(z[:1].astype(np.float64), z[1:].astype(np.float64)))
    assert deviation(z).dtype == np.float64


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, np.nan]])
def test_invalid_weights_are_rejected(weights):
    with pytest.raises(ConfigError, match="weights"):
        fuse(np.zeros((2, 3)), np.zeros((1, 3)), weights=weights)


@pytest.mark.parametrize(("base", "cap"), [(0.5, 1), (np.inf, 1), (20, -1), (20, np.inf)])
def test_invalid_penalties_are_rejected(base, cap):
    with pytest.raises(ConfigError, match=f"got base={base} and cap={cap}"):
        penalty(np.zeros((1, 3)), base, cap)


@pytest.mark.parametrize(
    ("strong", "weak"),
    [
        (np.zeros((0, 3)), np.zeros((1, 3))),
        (np.zeros((1, 3)), np.zeros((1, 4))),
        (np.zeros(3), np.zeros((1, 3))),
    ],
)
def test_scores_of_mismatched_shapes_are_rejected(strong, weak):
    with pytest.raises(DataError, match="for the same images, with at least one strong expert"):
        fuse(strong, weak)
