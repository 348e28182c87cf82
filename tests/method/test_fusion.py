"""The fusion by its formula and by the published functions, and what each expert contributes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusenorm_openood import FuseNorm, Settings, compute_id_statistics, fuse
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.method.fusion import Fusion, deviation, penalty
from fusenorm_openood.method.joint import JointDistance, joint_statistics
from fusenorm_openood.method.validation import scaled_weights
from fusenorm_openood.network import WideResNet
from tests import document
from tests.conftest import make_loader, make_net
from tests.nets import outputs_of
from tests.oracle import assert_atf_close

Z = arrays(np.float64, (3, 20), elements=st.one_of(st.floats(-3, 4), st.sampled_from([0.0, 1.0])))


def fuse_by_hand(strong, weak, base=20.0, cap=1.0, weights=None):
    """The formula, applied one image at a time."""
    fused = []
    for i in range(strong.shape[1]):
        largest = max([0.0, *(max(-z, z - 1) for z in weak[:, i])])
        fused.append(np.average(strong[:, i], weights=weights) - min(cap, base**largest - 1))
    return fused


@given(Z, Z, st.floats(1, 100), st.floats(0, 10))
def test_equals_the_formula_and_the_published_function(strong, weak, base, cap):
    expected, delta = document.fuse_norm(strong, weak)
    np.testing.assert_allclose(fuse(strong, weak), expected[0], atol=1e-12)
    deviations = deviation(torch.from_numpy(weak))
    np.testing.assert_allclose(penalty(deviations.amax(0)), delta[0], atol=1e-12)
    expected = fuse_by_hand(strong, weak, base, cap)
    np.testing.assert_allclose(fuse(strong, weak, None, base, cap), expected, atol=1e-9)
    weights = [1.0, 0.0, 2.0]
    expected = fuse_by_hand(strong, weak, base, cap, weights)
    np.testing.assert_allclose(fuse(strong, weak, weights, base, cap), expected, atol=1e-9)


def test_deviation_is_the_distance_to_the_unit_interval():
    z = torch.tensor([-0.5, 0, 0.3, 1, 1.25])
    torch.testing.assert_close(deviation(z), torch.tensor([0.5, 0, 0, 0, 0.25]))


def test_without_weak_experts_nothing_is_subtracted():
    np.testing.assert_array_equal(fuse([[1.0, 2.0]], np.empty((0, 2))), [1, 2])


def test_large_deviations_do_not_overflow_and_half_precision_is_fused_in_full():
    for base in (1.5, 2, 20):
        assert fuse([[0.5]], [[1e300]], base=base) == pytest.approx(-0.5)
    z = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float16)
    fused = fuse(z[:1], z[1:])
    assert fused.dtype == np.float64
    np.testing.assert_array_equal(fused, fuse(z[:1].astype(np.float64), z[1:].astype(np.float64)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *(({"weights": w}, "weights") for w in ([1], [1, -1], [0, 0], [1, np.nan])),
        ({"base": 0.5}, "base must be .* >= 1, got 0.5"),
        ({"base": np.inf}, "base must be .* got inf"),
        ({"cap": -1}, "cap must be .* >= 0, got -1"),
        ({"cap": np.inf}, "cap must be .* got inf"),
    ],
)
def test_invalid_weights_and_penalties_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        fuse(np.zeros((2, 3)), np.zeros((1, 3)), **change)


@pytest.mark.parametrize(("strong", "weak"), [((0, 3), (1, 3)), ((1, 3), (1, 4)), ((3,), (1, 3))])
def test_scores_of_mismatched_shapes_are_refused(strong, weak):
    with pytest.raises(DataError, match="for the same images, with at least one strong expert"):
        fuse(np.zeros(strong), np.zeros(weak))


LAYERS = 3  # and the output expert


def fusion_of(strong, weights=None, **changes):
    """A fusion of the norms of layers and another score, and the ID scores."""
    scores = np.random.default_rng(0).gamma(4.0, size=(LAYERS + 1, 400))
    settings = Settings(strong=["output", *range(len(strong) - 1)], **changes)
    rows = strong if settings.penalty == "joint" else slice(None)
    statistics = compute_id_statistics(scores[rows], 5, 95, clip=settings.clip)
    with_joint = settings.clip or settings.penalty == "joint"
    joint = joint_statistics(scores[:LAYERS]) if with_joint else None
    weights = scaled_weights(weights, len(strong))
    return Fusion(settings, strong, weights, LAYERS, LAYERS + 1, statistics, joint), scores


PERCENTILES = {"penalty": "deviation", "normalisation": "percentiles"}


@pytest.mark.parametrize(("strong", "weak"), [([3], [0, 1, 2]), ([1, 3], [0, 2]), ([3, 0], [1, 2])])
def test_strong_experts_carry_the_mean_and_only_the_others_are_weak(strong, weak):
    fusion, scores = fusion_of(strong, clip=False, base=20.0, cap=1.0, **PERCENTILES)
    given = fusion(torch.from_numpy(scores)).numpy()
    _, _, low, high = document.compute_id_statistics(scores, 5, 95)
    z = (scores - low[:, None]) / (high - low)[:, None]
    assert ((z[strong] > 1.05) | (z[strong] < -0.05)).any(1).all()  # no strong one is penalised
    np.testing.assert_allclose(given.sum(0), document.fuse_norm(z[strong], z[weak])[0][0])
    np.testing.assert_allclose(given[strong], z[strong] / len(strong), rtol=1e-12)
    deviations = np.maximum(0, np.maximum(-z[weak], z[weak] - 1))
    is_largest = np.arange(len(weak))[:, None] == deviations.argmax(0)
    expected = np.where(is_largest, np.maximum(-1, 1 - 20 ** deviations.max(0)), 0)
    np.testing.assert_allclose(given[weak], expected, atol=1e-12)


FAR = slice(0, 5), slice(5, 10)  # images on which the first and the second layer are far off


def test_the_clip_bounds_strong_scores_and_penalises_images_that_are_far_off():
    strong = [0, 3]
    fusion, known = fusion_of(strong, (1, 3), base=2.0, cap=0.5, **PERCENTILES)
    scores = known.copy()
    for layer, images in enumerate(FAR):  # one layer is far off
        scores[layer, images] *= np.geomspace(30, 300, 5)
    given = fusion(torch.from_numpy(scores)).numpy()
    _, _, low, high = document.compute_id_statistics(known, 5, 95)
    z = (scores - low[:, None]) / (high - low)[:, None]
    usual = fuse_by_hand(np.minimum(z[strong], 1), z[1:3], 2.0, 0.5, weights=(1, 3))
    distance = JointDistance(joint_statistics(known[:LAYERS]))
    far = distance.far_off(distance.terms(torch.from_numpy(scores[:LAYERS]))).numpy()
    assert (far[:10] > 1).all()
    np.testing.assert_allclose(given.sum(0), usual - 0.5 * far, rtol=1e-9, atol=1e-12)
    for layer, images in enumerate(FAR):  # which contributes it
        assert (given[layer, images] < -0.5 * far[images] + 1).all()


@pytest.mark.parametrize("clip", [True, False])
def test_strong_scores_are_standardised_after_the_clip(clip):
    fusion, scores = fusion_of([1, 3], (1, 2), joint_margin=1e3, clip=clip)
    test = scores * np.linspace(0.5, 5, 400)
    strong, most = scores[[1, 3]], np.percentile(scores[[1, 3]], 95 if clip else 100, axis=1)
    known, new = (np.minimum(x, most[:, None]) for x in (strong, test[[1, 3]]))
    if not clip:
        new = test[[1, 3]]
    z = (new - known.mean(1, keepdims=True)) / known.std(1, keepdims=True)
    found = fusion(torch.from_numpy(test)).sum(0)
    np.testing.assert_allclose(found, np.average(z, axis=0, weights=(1, 2)), rtol=1e-6, atol=1e-8)


def test_the_joint_penalty_is_shared_among_the_layers():
    fusion, scores = fusion_of([1, 3], joint_margin=2.0, cap=0.5)
    given = fusion(torch.from_numpy(scores)).numpy()
    distance = JointDistance(joint_statistics(scores[:LAYERS]))
    terms = distance.terms(torch.from_numpy(scores[:LAYERS]))
    expected = distance.penalty(terms, 2.0, 0.5)
    assert 0 < float((expected == 0.5).double().mean()) < 0.1
    np.testing.assert_allclose(
        given[:LAYERS].sum(0), fusion.normalised(torch.from_numpy(scores))[1] / 2 - expected
    )
    shares = terms.clamp(min=0)
    of_weak = -(expected * shares / shares.sum(0)).numpy()
    np.testing.assert_allclose(given[[0, 2]], of_weak[[0, 2]], rtol=1e-9, atol=1e-12)
    assert (given[[0, 2]] <= 0).all()


# The settings of the published notebooks; blocks count from 0.
NOTEBOOKS = [
    ("ResNet-18", "CIFAR-100", 0.05, 0.20, 0.5, 6),
    ("WRN-16-8", "CIFAR-100", 0.05, 0.20, 0.0, 4),
    ("ResNet-18", "ImageNet-100", 0.15, 0.35, 0.85, 6),
    ("WRN-16-8", "ImageNet-100", 0.10, 0.25, 0.0, 5),
]


@pytest.mark.parametrize(
    ("network", "id_data", "k_min", "k_max", "alpha", "block"), NOTEBOOKS, ids=str
)
def test_the_notebooks_settings_give_the_published_functions_confidence(
    loader, network, id_data, k_min, k_max, alpha, block
):
    torch.manual_seed(0)
    net = make_net() if network == "ResNet-18" else WideResNet(16, 1, 10).eval()
    settings = Settings.published(k_min=k_min, k_max=k_max, alpha=alpha, strong=(block, "output"))
    detector = FuseNorm(net, settings).fit(loader)
    assert (settings.score("output").temperature, settings.react_percentile) == (1000, 90)
    known, scored = detector.infer(loader).experts, detector.infer(OTHERS)
    images = torch.cat([images for images, _ in OTHERS])
    (maps,) = outputs_of(net, (detector.taps[block],), images)
    norms = torch.from_numpy(scored.experts[block]).float()
    assert_atf_close(norms, maps, 1e-4, k_min, k_max, alpha=alpha)
    _, _, low, high = document.compute_id_statistics(known, 1, 99.9)
    z = (scored.experts - low[:, None]) / (high - low)[:, None]
    last = len(detector.taps)
    weak = [row for row in range(last) if row != block]
    fused, delta = document.fuse_norm(z[[block, last]], z[weak])
    assert 0 < (delta < 1).mean() < 1  # some penalties are at the cap, some are not
    np.testing.assert_allclose(scored.conf, fused[0], rtol=1e-9, atol=1e-9)


OTHERS = make_loader(seed=5, scale=1.1)
