import pickle

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.posthoc import UNFITTED, PosthocBaseline
from fusenorm_openood.method.posthoc import POSTHOC

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors import base, posthoc
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError, NotFittedError
from fusenorm_openood.forward.samples import FeatureSample
from tests.conftest import assert_undisturbed, make_loader, state_of

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", POSTHOC)
def test_an_expert_alone_scores_as_within_fusenorm(net, loader, name):
    before = state_of(net)
    unlabelled = [images for images, _ in loader]
    alone = PosthocBaseline(net, name).fit(unlabelled)
    strong = FuseNorm(net, strong=[name], neighbours=50).fit(loader).infer([IMAGES])
    assert alone.fitted_on == "train"
    np.testing.assert_allclose(alone.score(IMAGES), strong.experts[-1], rtol=1e-5, atol=1e-6)
    assert_undisturbed(net, before)
    again = pickle.loads(pickle.dumps(alone))
    assert torch.equal(again.score(IMAGES), alone.score(IMAGES))


@pytest.mark.parametrize("name", POSTHOC)
def test_experts_are_fitted_before_they_score(net, name):
    detector = PosthocBaseline(net, name)
    if name in UNFITTED:
        assert torch.isfinite(detector.fit([]).score(IMAGES)).all()
    else:
        with pytest.raises(NotFittedError, match=f"this {name} is not fitted: call fit"):
            detector.score(IMAGES)
        with pytest.raises(DataError, match="loader must give at least one image"):
            detector.fit([])


def test_labels_decide_the_classes_where_the_loader_gives_them(net, loader):
    unlabelled = [images for images, _ in loader]
    by_label, by_prediction = (PosthocBaseline(net, "mds").fit(x) for x in (loader, unlabelled))
    assert not torch.allclose(by_label.score(IMAGES), by_prediction.score(IMAGES))
    # A fit of FuseNorm depends on images alone.
    fused = [FuseNorm(net).fit(x).score(IMAGES) for x in (loader, unlabelled)]
    assert torch.equal(*fused)


def test_arguments_are_checked(net):
    with pytest.raises(ConfigError, match="unknown argument 'k' of knn: choose from K"):
        PosthocBaseline(net, "knn", k=3)
    with pytest.raises(ConfigError, match="unknown post-hoc expert 'gram'"):
        PosthocBaseline(net, "gram")


@pytest.mark.parametrize("name", [name for name in POSTHOC if name not in UNFITTED])
def test_no_expert_is_fitted_on_features_that_are_not_finite(net, name):
    images = next(iter(make_loader()))[0]
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="image 3 of the batch has a penultimate feature"):
        PosthocBaseline(net, name).fit([(images, None)])


def test_no_image_is_its_own_neighbour(net, loader):
    detector = FuseNorm(net, strong=["knn"], neighbours=1).fit(loader)
    assert (detector.calibration_.id_scores[-1] < 0).all()
    assert (detector.infer(loader).experts[-1] > -1e-6).all()  # now they are


def test_more_images_than_the_limit_are_thinned_evenly(net, monkeypatch):
    loader = make_loader(60, batch_size=7)
    full = FuseNorm(net, strong=["energy"]).fit(loader).calibration_.id_scores
    monkeypatch.setattr(base, "FeatureSample", lambda: FeatureSample(limit=20))
    detector = FuseNorm(net, strong=["knn", "energy"]).fit(loader)
    scores = detector.calibration_.id_scores
    assert scores.shape == (10, 15)  # every fourth image
    np.testing.assert_allclose(scores[:9], full[:, ::4], rtol=1e-5)
    (state,) = detector.calibration_.fitted.states.values()
    assert len(state["features"]) == 15


@pytest.mark.parametrize("name", ["mds", "she", "nci", "fdbd"])
def test_means_and_covariances_are_those_of_all_images_beyond_the_limit(net, monkeypatch, name):
    images = torch.cat([batch for batch, _ in make_loader(60)])

    def fit():
        return FuseNorm(net, strong=[name]).fit([(images, None)]).calibration_

    whole = fit()
    monkeypatch.setattr(base, "FeatureSample", lambda: FeatureSample(limit=20))
    thinned = fit()
    assert thinned.id_scores.shape[1] == 15
    # Images are left out of the fit to all of them.
    np.testing.assert_allclose(thinned.id_scores, whole.id_scores[:, ::4], rtol=1e-4, atol=1e-6)
    (all_of_it,), (state,) = (c.fitted.states.values() for c in (whole, thinned))
    assert all(torch.equal(state[key], value) for key, value in all_of_it.items())


def test_the_default_reads_the_loader_once_and_needs_one_forward_pass(net, loader):
    passes = []

    def note(module, args, output):
        if len(args[0]) > 2:  # not the passes by which the network is understood
            passes.append(len(args[0]))

    net.conv1.register_forward_hook(note)
    for settings in (Settings(), Settings.joint()):
        detector = FuseNorm(net, settings).fit(loader)
        assert sum(passes) == 60
        passes.clear()
        detector.score(IMAGES)
        assert sum(passes) == len(IMAGES)
        passes.clear()


def test_a_baseline_keeps_no_more_features_than_memory_allows(net, monkeypatch):
    loader = make_loader(60, batch_size=7)
    row = 4 * (net.fc.in_features + net.fc.out_features)
    (whole,) = PosthocBaseline(net, "knn").fit(loader)._fitted.states.values()
    monkeypatch.setattr(posthoc, "FeatureSample", lambda limit: FeatureSample(limit, 20 * row))
    (thinned,) = PosthocBaseline(net, "knn").fit(loader)._fitted.states.values()
    assert torch.equal(thinned["features"], whole["features"][::4])
