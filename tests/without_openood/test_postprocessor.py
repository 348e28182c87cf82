import pickle

import numpy as np
import pytest
import torch
import yaml

from fusenorm_openood import FuseNormPostprocessor
from fusenorm_openood.errors import ConfigError, DataError, FuseNormError, NotFittedError
from fusenorm_openood.storage.configs import config_root
from tests.conftest import assert_undisturbed, make_loader, make_net, state_of

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))
SWEEP = {"base": [2, 20], "strong": ["auto", ["output"]], "k_max": [0.25, 0.5]}


def config(sweep=None, **args):
    """The published settings with some changed."""
    c = yaml.safe_load((config_root() / "postprocessors" / "fusenorm_published.yml").read_text())
    c["postprocessor"]["postprocessor_args"].update(args)
    if sweep is not None:
        c["postprocessor"]["postprocessor_sweep"] = sweep
    return c


@pytest.fixture
def as_dicts():
    return [{"data": images, "label": labels} for images, labels in make_loader()]


@pytest.fixture
def ready(net, as_dicts):
    p = FuseNormPostprocessor(config(SWEEP))
    p.setup(net, {"val": as_dicts, "train": None, "test": None}, {})
    return p


def test_contract(ready, net, as_dicts):
    assert ready.setup_flag
    assert not ready.APS_mode
    assert not ready.hyperparam_search_done
    assert ready.args_dict == SWEEP
    before = state_of(net)
    pred, conf, label = ready.inference(net, as_dicts, progress=False)
    assert_undisturbed(net, before)
    assert pred.dtype == label.dtype == np.int64
    assert label.tolist() == torch.cat([b["label"] for b in as_dicts]).tolist()
    assert pred.shape == conf.shape == (60,)


def test_unpickled_it_gives_the_same_scores(ready, net, as_dicts):
    pickled = pickle.dumps(ready)
    assert len(pickled) < 20_000  # neither the network nor the images are in it
    again = pickle.loads(pickled)
    again.setup(net, {"val": None}, {})
    assert torch.equal(again.postprocess(net, IMAGES)[1], ready.postprocess(net, IMAGES)[1])


@pytest.mark.parametrize(
    "values", [[2, "auto", 0.25], [20, ["output"], 0.25], [2, ["output"], 0.5]]
)
def test_hyperparameters_recompute_everything_that_depends_on_them(ready, net, as_dicts, values):
    ready.set_hyperparam(values)
    assert ready.get_hyperparam() == [
        values[0],
        tuple(values[1]) if isinstance(values[1], list) else values[1],
        values[2],
    ]
    base, strong, k_max = values
    fresh = FuseNormPostprocessor(config(base=base, strong=strong, k_max=k_max))
    fresh.setup(net, {"val": as_dicts})
    assert torch.equal(ready.postprocess(net, IMAGES)[1], fresh.postprocess(net, IMAGES)[1])
    ready.set_hyperparam([20, "auto", 0.25])
    original = FuseNormPostprocessor(config())
    original.setup(net, {"val": as_dicts})
    assert torch.equal(ready.postprocess(net, IMAGES)[1], original.postprocess(net, IMAGES)[1])


def test_fusion_settings_change_without_another_pass(ready, net):
    calls = []
    net.conv1.register_forward_hook(lambda *_: calls.append(1))
    ready.set_hyperparam([2, ["output"], 0.25])
    ready.postprocess(net, IMAGES)
    assert len(calls) == 2  # ODIN's two passes over the test images, none over the ID images


def test_setup_flag_prevents_a_second_fit(ready, net):
    ready.setup(net, {"val": []}, {})
    ready.postprocess(net, IMAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["postprocessor_args"].pop("alpha"), "'alpha' is missing: the settings are"),
        (lambda p: p["postprocessor_args"].update(alhpa=1), "unknown setting 'alhpa'"),
        (lambda p: p.pop("APS_mode"), "'postprocessor.APS_mode' is missing"),
        (lambda p: p.pop("postprocessor_sweep"), "'postprocessor.postprocessor_sweep' is missing"),
        (lambda p: p.update(postprocessor_sweep={"bsae": [1]}), "unknown setting 'bsae'"),
        (lambda p: p.update(postprocessor_sweep={"base": 1}), "base must be a non-empty list"),
        (lambda p: p.update(postprocessor_sweep={"base": [20, 0.1]}), r"base must be .*got 0\.1"),
        (lambda p: p.update(APS_mod=True), "unknown key 'APS_mod' of postprocessor"),
        (lambda p: p.update(APS_mode="False"), "APS_mode must be .* got 'False'"),
    ],
)
def test_configurations_with_a_typo_are_rejected(change, message):
    c = config()
    change(c["postprocessor"])
    with pytest.raises(ConfigError, match=message):
        FuseNormPostprocessor(c)
    with pytest.raises(ConfigError, match="'postprocessor' is missing"):
        FuseNormPostprocessor({})


def test_misuse_raises_typed_errors(net):
    p = FuseNormPostprocessor(config())
    with pytest.raises(NotFittedError, match="call setup"):
        p.postprocess(net, IMAGES)
    with pytest.raises(DataError, match=r"id_loader_dict must contain 'val'.*, got train"):
        p.setup(net, {"train": []})
    with pytest.raises(
        ConfigError, match=r"hyperparam must have .* values \(k_min, .*got \[1, 2\]"
    ):
        p.set_hyperparam([1, 2])
    with pytest.raises(FuseNormError):
        p.setup(net, {"val": []})
    assert not p.setup_flag


def test_another_network_is_not_scored_with_the_statistics_of_the_first(ready):
    with pytest.raises(ConfigError, match="with other weights or another forward"):
        ready.postprocess(make_net(seed=3), IMAGES)
