import numpy as np
import pytest
import torch

from fusenorm_openood.errors import DataError, ZeroRangeError
from fusenorm_openood.method.joint import JointDistance, joint_statistics

MARGIN, CAP = 3.0, 1e6


def norms(layers=5, images=300, seed=0):
    """Correlated positive norms `[L, N]`."""
    g = np.random.default_rng(seed)
    shared = g.normal(size=images)
    return np.exp(0.3 * g.normal(size=(layers, images)) + 0.5 * shared)


def measured(known, x, what):
    """`log_distance`, `far_off` or `penalty` of norms, from the statistics of others."""
    distance = JointDistance(joint_statistics(known))
    terms = distance.terms(torch.from_numpy(np.asarray(x)))
    given = (MARGIN, CAP) if what == "penalty" else ()
    return getattr(distance, what)(terms, *given).numpy()


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


def left_out(known):
    """log M of each ID image from the others, with its share of their covariance taken out."""
    of_id = log_m(known, known)
    leverage = (len(known) * np.exp(2 * of_id) + 1) / known.shape[1]
    return of_id - np.log(1 - leverage)


@pytest.mark.parametrize("images", [40, 300, 2000])
@pytest.mark.parametrize("layers", [1, 2, 8])
def test_equals_the_formula(layers, images):
    known, unknown = norms(layers, images), norms(layers, 60, seed=1) ** 20
    expected, apart = log_m(known, unknown), left_out(known)
    np.testing.assert_allclose(measured(known, unknown, "log_distance"), expected, rtol=1e-9)
    rare = np.sort(apart)[int(0.999 * (images - 1))]
    limit = max(apart.mean() + 2.5 * apart.std(), rare)
    beyond = 16 * np.maximum(0, expected - limit) / apart.std()
    assert (beyond > 0).any()
    far_off = measured(known, unknown, "far_off")
    np.testing.assert_allclose(far_off, beyond, rtol=1e-4, atol=1e-6)
    t, farthest = ((x - apart.mean()) / apart.std() for x in (expected, limit))
    raised = np.minimum(CAP, np.exp(t - MARGIN))
    raised += 0.8 * CAP * np.maximum(0, t - max(MARGIN, farthest))
    np.testing.assert_allclose(measured(known, unknown, "penalty"), raised, rtol=1e-4)


@pytest.mark.parametrize("cap", [0.0, 0.5, 10.0])
def test_the_penalty_is_1_at_the_margin_and_grows_to_the_cap(cap):
    near = {"log_mean": 0.0, "log_std": 0.5, "limit": np.inf}
    distance = JointDistance(joint_statistics(norms())._replace(**near))
    squares = torch.tensor([[0.0, 1.0, np.exp(2.0), 1e300]]) * distance.varying
    found = distance.penalty(squares, 2.0, cap).numpy()
    np.testing.assert_allclose(found, np.minimum(cap, [0, np.exp(-2), 1, np.inf]), atol=1e-6)


def test_the_order_of_layers_and_their_scales_change_nothing():
    known, unknown = norms(), norms(images=20, seed=2)
    order, scale = [3, 0, 4, 1, 2], np.array([[1e-3], [1], [10], [1e3], [7]])
    found = measured((scale * known)[order], (scale * unknown)[order], "penalty")
    np.testing.assert_allclose(found, measured(known, unknown, "penalty"), rtol=1e-6)


def test_fewer_images_than_layers_and_a_single_layer_give_finite_penalties():
    for layers, images in ((20, 4), (27, 2), (1, 300)):
        for x in (norms(layers, 30, seed=1), 1e6 * norms(layers, 3), np.zeros((layers, 2))):
            assert np.isfinite(measured(norms(layers, images), x, "penalty")).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_dead_or_constant_layer_is_left_out_with_a_warning(constant):
    known, unknown = norms(4), norms(4, 30, seed=1)
    expected = measured(known, unknown, "penalty")
    known, unknown = (np.insert(x, 2, constant, axis=0) for x in (known, unknown))
    with pytest.warns(RuntimeWarning, match="constant on the ID images: layer2"):
        joint_statistics(known, ["a", "b", "layer2", "c", "d"])
    np.testing.assert_allclose(measured(known, unknown, "penalty"), expected)
    unknown[2] = 5.0  # it says nothing about images on which it is not constant either
    np.testing.assert_allclose(measured(known, unknown, "penalty"), expected)


def test_a_layer_that_is_dead_on_one_image_rejects_it():
    image = norms()[:, :1].copy()
    image[3] = 0
    assert measured(norms(), image, "penalty")[0] > 1000


def test_no_variation_and_no_images_are_errors():
    with pytest.raises(ZeroRangeError, match="all 2 layers are constant"):
        joint_statistics(np.ones((2, 9)))
    for bad in (np.ones((2, 0)), np.ones(3)):
        with pytest.raises(DataError, match=r"\[layers, images\] with at least one image"):
            joint_statistics(bad)


def test_an_id_image_left_out_is_as_far_as_its_leverage_says():
    known = norms(5, 200)
    found = [
        measured(np.delete(known, i, axis=1), known[:, [i]], "log_distance")[0] for i in range(200)
    ]
    np.testing.assert_allclose(left_out(known), found, atol=0.1)


@pytest.mark.parametrize("images", [3, 20, 300])
@pytest.mark.parametrize("layers", [1, 4, 16])
def test_hardly_an_id_image_is_far_off_however_few_were_fitted(layers, images):
    hit = [
        measured(norms(layers, images, seed), norms(layers, 1000, seed=100 + seed), "far_off")
        for seed in range(10)
    ]
    assert np.mean(np.array(hit) > 0) < 0.01


@pytest.mark.parametrize("layers", [2, 8])
def test_the_farther_the_more_far_off_without_a_bound(layers):
    known = norms(layers)
    direction = np.random.default_rng(1).normal(size=(layers, 1))
    center = np.exp(np.log(known).mean(1, keepdims=True))
    found = measured(known, center * np.exp(direction * np.linspace(0, 60, 200)), "far_off")
    assert found[0] == 0 < found[-1]
    assert (np.diff(found) >= 0).all()
    assert np.diff(found[found > 0]).min() > 0


def test_an_image_that_no_single_layer_finds_odd_is_far_off():
    shared = np.random.default_rng(0).normal(size=(1, 500))
    known = np.exp(shared + 0.1 * np.random.default_rng(1).normal(size=(6, 500)))
    image = np.exp([[1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]])
    assert (known.min(1) < image[:, 0]).all()
    assert (image[:, 0] < known.max(1)).all()
    assert measured(known, image, "far_off")[0] > 8
