"""Trust in experts from the ID images of their fit alone."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from fusenorm_openood import FuseNorm
from fusenorm_openood.method.scores import make_score
from fusenorm_openood.method.statistics import trust
from tests.conftest import make_loader, make_net
from tests.method.test_scores import fit, make_features, make_head

ROWS = arrays(np.float64, 12, elements=st.integers(-5, 5).map(lambda n: n + 10.0))


@given(ROWS, ROWS)
def test_is_scipys_rank_correlation_from_0(left_out, in_sample):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant scores
        expected = spearmanr(left_out, in_sample).statistic
    expected = max(0, expected) if np.isfinite(expected) else 0
    assert trust(left_out, in_sample) == pytest.approx(expected, abs=1e-9)
    assert trust(left_out, 2 * left_out) in (0, 1)


def of_fit(name, images, classes=5, features=24):
    head = make_head(features, classes)
    batch, labels = make_features(images, head)
    labels = torch.arange(images) if classes > images else labels
    score = make_score(name)
    state = fit(score, batch, labels, head)
    return trust(*(score(batch, head, state, y).numpy() for y in (labels, None)))


MAHALANOBIS = ("mds", "mds++", "rmds", "rmds++", "mahavar", "head_mds")


@pytest.mark.parametrize("name", ["knn", *MAHALANOBIS, "she"])
def test_many_images_give_nearly_1(name):
    assert of_fit(name, 3000) > 0.99


@pytest.mark.parametrize("name", ["mds", "mds++", "rmds++"])
def test_class_means_of_one_image_each_have_none(name):
    assert of_fit(name, 150, classes=400) < 0.3
    assert of_fit("head_mds", 150, classes=400) > 0.9


def test_a_shrunk_covariance_lessens_the_trust():
    net, share = make_net(), []
    for images in (30, 300):
        fitted = FuseNorm(net).fit(make_loader(images)).id_statistics_
        (state,) = (s for score, s in fitted.fitted.states.items() if score.name == "head_mds")
        share.append(float(state["shrinkage"]))
        assert fitted.trust["head_mds"] == pytest.approx(1 - share[-1], abs=0.1)
    assert share[0] > 0.1 > share[1] > 0


def test_scores_without_a_fit_to_be_left_out_of_are_trusted():
    fitted = FuseNorm(make_net(), strong=("output", "gen", "fdbd", "nci")).fit(make_loader(60))
    assert {*fitted.id_statistics_.trust.values()} == {1.0}


def test_the_weights_are_those_of_the_settings_times_the_trust():
    net, loader = make_net(), make_loader(60)
    detector = FuseNorm(net, weights=(1, 1, 2, 4)).fit(loader)
    fitted = detector.id_statistics_
    (trusted,) = fitted.fitted.trust.values()
    parts = np.array([1, 1, 2, 4 * trusted])
    np.testing.assert_allclose([*fitted.weights.values()], parts / parts.sum())
    assert f"head_mds {fitted.weights['head_mds']:.2f}; fitted on 60" in repr(detector)
    assert detector.explain(torch.randn(2, 3, 16, 16)).weights == fitted.weights
    untrusted = FuseNorm(net, weights=(1, 1, 2, 4), trust=False).with_statistics(fitted)
    assert [*untrusted.id_statistics_.weights.values()] == [1 / 8, 1 / 8, 1 / 4, 1 / 2]


def test_an_expert_without_weight_is_said(monkeypatch):
    net, loader = make_net(), make_loader(60)
    monkeypatch.setattr("fusenorm_openood.detectors.fitting.trust", lambda *scores: 0.0)
    with pytest.warns(UserWarning, match="trusted after a fit on 60 ID images: head_mds; fit on"):
        detector = FuseNorm(net).fit(loader)
    assert detector.id_statistics_.weights["head_mds"] == 0
    with pytest.warns(UserWarning, match="cannot be trusted"):
        alone = FuseNorm(net, strong=["head_mds"]).fit(loader)
    assert alone.id_statistics_.weights == {"head_mds": 1}
