"""The three methods as postprocessors, and their search on pseudo-OOD images."""

import pickle

import pytest
import torch

from fusenorm_openood import FuseNorm, FuseNormPostprocessor
from fusenorm_openood.detectors.search import search
from fusenorm_openood.errors import NotFittedError
from fusenorm_openood.method.settings import METHODS, Settings
from fusenorm_openood.storage.configs import config_root, read_config
from tests.conftest import make_loader

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))
STRONG = Settings().strong
SWEEP = {
    "strong": [[*STRONG], [*reversed(STRONG)], ["output", "knn"]],
    "penalty": ["deviation", "joint"],
    "base": [2, 20],
}


def postprocessor(method, sweep, aps_mode=False):
    config = read_config(config_root() / "postprocessors" / f"{method}.yml")
    config["postprocessor"].update(postprocessor_sweep=sweep, APS_mode=aps_mode)
    return FuseNormPostprocessor(config)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_scores_as_its_detector_after_pickling_too(net, loader, method):
    p = postprocessor(method, {"base": [2]})
    p.setup(net, {"val": loader})
    expected = FuseNorm(net, METHODS[method]()).fit(loader).predict(IMAGES)
    for each in (p, pickle.loads(pickle.dumps(p))):
        pred, conf = each.postprocess(net, IMAGES)
        assert torch.equal(pred, expected[0])
        assert torch.equal(conf, expected[1])


@pytest.mark.parametrize(
    ("strong", "penalty"), [(SWEEP["strong"][0], "deviation"), (SWEEP["strong"][1], "joint")]
)
def test_after_unpickling_settings_of_the_same_experts_need_no_images(net, loader, strong, penalty):
    p = postprocessor("fusenorm", SWEEP)
    p.setup(net, {"val": loader})
    again = pickle.loads(pickle.dumps(p))
    again.set_hyperparam([strong, penalty, 20])
    changed = Settings(strong=strong, penalty=penalty, base=20)
    fresh = FuseNorm(net, changed).fit(loader)
    assert torch.equal(again.postprocess(net, IMAGES)[1], fresh.score(IMAGES))
    assert again.setup_flag


def test_after_unpickling_a_new_expert_needs_another_setup(net, loader):
    p = postprocessor("fusenorm", SWEEP)
    p.setup(net, {"val": loader})
    again = pickle.loads(pickle.dumps(p))
    for each in (p, again):
        each.set_hyperparam([["output", "knn"], "deviation", 2])
    with pytest.raises(NotFittedError, match="call setup"):
        again.postprocess(net, IMAGES)
    assert not again.setup_flag
    again.setup(net, {"val": loader})
    fresh = FuseNorm(net, strong=["output", "knn"], penalty="deviation").fit(loader).score(IMAGES)
    for each in (p, again):  # the first has the images of its setup
        assert torch.equal(each.postprocess(net, IMAGES)[1], fresh)


@pytest.mark.parametrize("method", ["fusenorm", "fusenorm_published"])
def test_setup_searches_on_pseudo_ood_images_alone(net, method):
    sweep = {"cap": [0.5, 1.0], "strong": [["output"], ["output", "knn"], [1]]}
    loader = make_loader(60)
    p = postprocessor(method, sweep, "pseudo")
    p.setup(net, {"val": loader})
    found = search(net, METHODS[method](), sweep, loader)
    assert p.settings == found.settings
    assert p.get_hyperparam() == [found.settings.cap, found.settings.strong]
    # OpenOOD does not search again.
    assert (p.APS_mode, p.hyperparam_search_done, p.setup_flag) == (False, True, True)
    fresh = FuseNorm(net, found.settings).fit(loader)
    torch.testing.assert_close(p.postprocess(net, IMAGES)[1], fresh.score(IMAGES))
    again = pickle.loads(pickle.dumps(p))
    assert torch.equal(again.postprocess(net, IMAGES)[1], p.postprocess(net, IMAGES)[1])
