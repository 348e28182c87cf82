"""Single scores as detectors: OpenOOD's numbers, names and arguments, and their fit."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors import fitting
from fusenorm_openood.detectors.fitting import Sample
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import (
    CheckpointError,
    DataError,
    NonFiniteError,
    NotFittedError,
)
from fusenorm_openood.method.scores import LOGIT_SCORES, POSTHOC, make_score
from tests.conftest import assert_undisturbed, make_loader, make_net, state_of

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))
STD = (0.2, 0.3, 0.4)
FITTED = [name for name, score in POSTHOC.items() if score.needs_fit]
LOGITS = [name for name in LOGIT_SCORES if name != "t2fnorm"]


def made(net, name):
    given, fixed = ({"temperature": 2.0}, {}) if name == "ebo" else ({}, {})
    if name == "odin":
        fixed = {"input_std": STD}
    return SingleScore(net, make_score(name, given, **fixed))


def expected_scores(net, name, loader):
    """The scores in float32, from their definition."""
    with torch.no_grad():
        logits, feature = net(IMAGES, return_feature=True)
        if name == "msp":
            return logits.softmax(1).amax(1)
        if name == "mls":
            return logits.amax(1)
        if name == "ebo":
            return 2 * torch.logsumexp(logits / 2, 1)
        if name == "react":
            known = torch.cat([net(i, return_feature=True)[1] for i, _ in loader])
            clipped = feature.clip(max=np.percentile(known.numpy(), 90))
            return torch.logsumexp(net.fc(clipped), 1)
    x = IMAGES.clone().requires_grad_()
    y = net(x) / 1000
    F.cross_entropy(y, y.argmax(1)).backward()
    step = torch.where(x.grad >= 0, 0.0014, -0.0014) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        return (net(x - step) / 1000).softmax(1).amax(1)


@pytest.mark.parametrize("name", LOGITS)
def test_scores_of_logits_equal_their_definition_in_float32(net, loader, name):
    before = state_of(net)
    detector = made(net, name).fit(loader)
    scored = detector.infer([IMAGES])
    assert_undisturbed(net, before)
    assert scored.conf.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(scored.conf), expected_scores(net, name, loader))
    with torch.no_grad():
        assert scored.pred.tolist() == net(IMAGES).argmax(1).tolist()
        net.fc.weight *= 3
        net.fc.bias *= 3
    assert made(net, name).fit(loader).score(IMAGES).mean() > scored.conf.mean()


def test_t2fnorm_needs_a_network_trained_with_it(net):
    with pytest.raises(CheckpointError, match="needs a network trained with T2FNorm"):
        SingleScore(net, "t2fnorm")


@pytest.mark.parametrize("name", POSTHOC)
def test_a_posthoc_score_alone_is_that_within_fusenorm(net, loader, name):
    before = state_of(net)
    unlabelled = [images for images, _ in loader]
    alone = SingleScore(net, name)
    if name in FITTED:
        with pytest.raises(
            NotFittedError, match=rf"this {re.escape(name)} is not fitted: call fit"
        ):
            alone.score(IMAGES)
        with pytest.raises(DataError, match="loader must give at least one image"):
            alone.fit([])
    alone.fit(unlabelled if name in FITTED else [])
    strong = FuseNorm(net, strong=[name], neighbours=50).fit(loader).infer([IMAGES])
    assert alone.fitted_on == "train"
    np.testing.assert_allclose(alone.score(IMAGES), strong.experts[-1], rtol=1e-5, atol=1e-6)
    assert_undisturbed(net, before)
    again = pickle.loads(pickle.dumps(alone))
    assert torch.equal(again.score(IMAGES), alone.score(IMAGES))


def test_react_is_fitted_before_it_scores(net):
    assert made(net, "msp").fitted_on == "val"
    with pytest.raises(NotFittedError, match="react is not fitted: call fit"):
        made(net, "react").score(IMAGES)


def test_labels_decide_the_classes_where_the_loader_gives_them(net, loader):
    unlabelled = [images for images, _ in loader]
    by_label, by_prediction = (SingleScore(net, "mds++").fit(x) for x in (loader, unlabelled))
    assert not torch.allclose(by_label.score(IMAGES), by_prediction.score(IMAGES))
    # A fit of FuseNorm depends on images alone.
    fused = [FuseNorm(net).fit(x).score(IMAGES) for x in (loader, unlabelled)]
    assert torch.equal(*fused)


@pytest.mark.parametrize("name", ["knn", "mds++", "vim"])
def test_no_score_is_fitted_on_features_that_are_not_finite(net, name):
    images = next(iter(make_loader()))[0]
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="image 3 of the batch has a penultimate feature"):
        SingleScore(net, name).fit([(images, None)])


def test_no_image_is_its_own_neighbour(net, loader):
    detector = FuseNorm(net, strong=["knn"], neighbours=1).fit(loader)
    assert (detector.id_statistics_.id_scores[-1] < 0).all()
    assert (detector.infer(loader).experts[-1] > -1e-6).all()  # now they are


def test_more_images_than_the_limit_are_thinned_evenly(net, monkeypatch):
    """Means and covariances are those of all images, to which each is left out."""
    loader, strong = make_loader(60, batch_size=7), ["knn", "energy", "mds++", "she", "nci", "fdbd"]
    whole = FuseNorm(net, strong=strong).fit(loader).id_statistics_
    monkeypatch.setattr(fitting, "Sample", lambda limit: Sample(20))
    thinned = FuseNorm(net, strong=strong).fit(loader).id_statistics_
    rows = [row for row, name in enumerate(whole.experts) if name != "knn"]
    assert thinned.id_scores.shape == (len(whole.experts), 15)  # every fourth image
    expected = whole.id_scores[rows, ::4]
    np.testing.assert_allclose(thinned.id_scores[rows], expected, rtol=1e-4, atol=1e-6)
    for score, state in thinned.fitted.states.items():
        for name, value in whole.fitted.states[score].items():
            assert torch.equal(state[name], value[::4] if score.name == "knn" else value)


@pytest.mark.parametrize("name", ["ash", "scale"])
def test_weights_that_are_replaced_are_read_again(name):
    net = make_net()
    detector = SingleScore(net, name)
    detector.score(IMAGES)
    generator = torch.Generator().manual_seed(7)
    net.fc.weight = torch.nn.Parameter(torch.randn(net.fc.weight.shape, generator=generator))
    assert torch.equal(detector.score(IMAGES), SingleScore(net, name).score(IMAGES))
