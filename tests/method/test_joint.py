import numpy as np
import pytest

from fusenorm_openood.errors import DataError, ZeroRangeError
from fusenorm_openood.method.joint import (
    far_off,
    joint_penalty,
    joint_statistics,
    log_joint_distance,
)


def norms(blocks=5, images=300, seed=0):
    """Correlated positive norms `[L, N]`."""
    g = np.random.default_rng(seed)
    shared = g.normal(size=images)
    return np.exp(0.3 * g.normal(size=(blocks, images)) + 0.5 * shared)


def log_m(known, x):
    """log M by its formula, one image at a time."""
    v = np.log(known)
    m = [row.sum() / len(row) for row in v]
    s = [np.sqrt(((row - mean) ** 2).sum() / len(row)) for row, mean in zip(v, m, strict=True)]
    L = len(v)
    C = np.empty((L, L))
    for i in range(L):
        for j in range(L):
            C[i, j] = np.mean((v[i] - m[i]) * (v[j] - m[j])) / (s[i] * s[j]) + 0.001 * (i == j)
    values = []
    for image in np.asarray(x).T:
        u = (np.log(image) - m) / s
        values.append(0.5 * np.log(u @ np.linalg.solve(C, u) / L))
    return np.array(values)


@pytest.mark.parametrize("blocks", [2, 5, 8])
def test_equals_the_formula(blocks):
    known, unknown = norms(blocks), 2 * norms(blocks, 40, seed=1)
    statistics = joint_statistics(known)
    expected = log_m(known, unknown)
    np.testing.assert_allclose(log_joint_distance(unknown, statistics), expected, rtol=1e-9)
    of_id = log_m(known, known)
    standardised = (expected - of_id.mean()) / of_id.std()
    found = joint_penalty(unknown, statistics) - far_off(unknown, statistics)
    np.testing.assert_allclose(found, standardised, rtol=1e-6, atol=1e-9)


def test_blocks_that_deviate_together_as_id_images_do_are_nearer_than_those_that_do_not():
    known = norms()
    together, apart = np.full((5, 1), 3.0), np.array([[3.0], [1 / 3], [3.0], [1 / 3], [3.0]])
    statistics = joint_statistics(known)
    assert joint_penalty(together, statistics) < joint_penalty(apart, statistics)


def test_the_order_of_blocks_and_their_scales_change_nothing():
    known, unknown = norms(), norms(images=20, seed=2)
    order, scale = [3, 0, 4, 1, 2], np.array([[1e-3], [1], [10], [1e3], [7]])
    expected = joint_penalty(unknown, joint_statistics(known))
    found = joint_penalty((scale * unknown)[order], joint_statistics((scale * known)[order]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fewer_images_than_blocks_and_a_single_block_give_finite_penalties():
    for blocks, images in ((20, 4), (27, 2), (1, 300)):
        statistics = joint_statistics(norms(blocks, images))
        for x in (norms(blocks, 30, seed=1), 1e6 * norms(blocks, 3), np.zeros((blocks, 2))):
            assert np.isfinite(joint_penalty(x, statistics)).all()


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_dead_or_constant_block_is_left_out_with_a_warning(constant):
    known, unknown = norms(4), norms(4, 30, seed=1)
    expected = joint_penalty(unknown, joint_statistics(known))

    def with_it(x):
        return np.insert(x, 2, constant, axis=0)

    with pytest.warns(RuntimeWarning, match="constant on the ID images: layer2"):
        statistics = joint_statistics(with_it(known), ["a", "b", "layer2", "c", "d"])
    np.testing.assert_allclose(joint_penalty(with_it(unknown), statistics), expected)
    unknown = with_it(unknown)
    unknown[2] = 5.0  # it says nothing about images on which it is not constant either
    np.testing.assert_allclose(joint_penalty(unknown, statistics), expected)


def test_a_block_that_is_dead_on_one_image_rejects_it():
    known = norms()
    image = known[:, :1].copy()
    image[3] = 0
    assert 10 < joint_penalty(image, joint_statistics(known))[0] < np.inf


def test_no_variation_and_no_images_are_errors():
    with pytest.raises(ZeroRangeError, match="all 2 blocks are constant"):
        joint_statistics(np.ones((2, 9)))
    for bad in (np.ones((2, 0)), np.ones(3)):
        with pytest.raises(DataError, match=r"\[blocks, images\] with at least one image"):
            joint_statistics(bad)


def left_out(known):
    """log M of each ID image from the others, with its share of their covariance taken out."""
    of_id = log_m(known, known)
    leverage = (len(known) * np.exp(2 * of_id) + 1) / known.shape[1]
    return of_id - np.log(1 - leverage)


@pytest.mark.parametrize("images", [40, 300, 3000])
@pytest.mark.parametrize("blocks", [1, 5])
def test_far_off_equals_its_formula(blocks, images):
    known, unknown = norms(blocks, images), norms(blocks, 60, seed=1) ** 20
    distances = left_out(known)
    limit = max(
        distances.mean() + 2.5 * distances.std(), np.sort(distances)[int(0.999 * (images - 1))]
    )
    beyond = np.maximum(0, log_m(known, unknown) - limit) / log_m(known, known).std()
    assert (beyond > 0).any()
    found = far_off(unknown, joint_statistics(known))
    np.testing.assert_allclose(found, 16 * beyond, rtol=1e-4, atol=1e-6)


def test_an_id_image_left_out_is_as_far_as_its_leverage_says():
    known, statistics = norms(5, 200), []
    for i in range(200):
        others = joint_statistics(np.delete(known, i, axis=1))
        statistics.append(log_joint_distance(known[:, [i]], others)[0])
    np.testing.assert_allclose(left_out(known), statistics, atol=0.1)


@pytest.mark.parametrize("images", [3, 8, 20, 60, 300])
@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_hardly_an_id_image_is_far_off_however_few_were_fitted(blocks, images):
    hit = [
        far_off(norms(blocks, 1000, seed=100 + seed), joint_statistics(norms(blocks, images, seed)))
        for seed in range(10)
    ]
    assert np.mean(np.array(hit) > 0) < 0.01


@pytest.mark.parametrize("blocks", [2, 8])
def test_the_farther_the_more_far_off_without_a_bound(blocks):
    known = norms(blocks)
    direction = np.random.default_rng(1).normal(size=(blocks, 1))
    center = np.exp(np.log(known).mean(1, keepdims=True))
    found = far_off(center * np.exp(direction * np.linspace(0, 60, 200)), joint_statistics(known))
    assert found[0] == 0 < found[-1]
    assert (np.diff(found) >= 0).all()
    assert np.diff(found[found > 0]).min() > 0


def test_an_image_that_no_single_block_finds_odd_is_far_off():
    shared = np.random.default_rng(0).normal(size=(1, 500))
    known = np.exp(shared + 0.1 * np.random.default_rng(1).normal(size=(6, 500)))
    image = np.exp([[1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]])
    assert (known.min(1) < image[:, 0]).all()
    assert (image[:, 0] < known.max(1)).all()
    assert far_off(image, joint_statistics(known))[0] > 8
