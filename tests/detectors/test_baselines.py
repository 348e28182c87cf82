import re

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.baselines import BASELINES, Baseline
from torch.nn import functional as F

from fusenorm_openood.errors import CheckpointError, ConfigError, NotFittedError
from fusenorm_openood.network import T2FNormNet
from tests.conftest import CLASSES, assert_undisturbed, make_loader, make_net, state_of

ARGS = {
    "ebo": {"temperature": 2.0},
    "odin": {"temperature": 1000.0, "noise": 0.0014},
    "react": {"percentile": 90.0},
}
STD = (0.2, 0.3, 0.4)
IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))


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


@pytest.mark.parametrize("name", ["msp", "mls", "ebo", "odin", "react"])
def test_equals_its_definition_in_float32(net, loader, name):
    before = state_of(net)
    detector = Baseline(net, name, STD, **ARGS.get(name, {})).fit(loader)
    scored = detector.infer([IMAGES])
    assert_undisturbed(net, before)
    assert scored.conf.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(scored.conf), expected_scores(net, name, loader))
    with torch.no_grad():
        assert scored.pred.tolist() == net(IMAGES).argmax(1).tolist()


def test_t2fnorm_is_msp_of_the_scoring_logits(net):
    wrapped = T2FNormNet(net, CLASSES)
    wrapped.set_tau(0.1)
    with torch.no_grad():
        expected = wrapped.forward_ood_inference(IMAGES).softmax(1).amax(1)
    torch.testing.assert_close(Baseline(wrapped, "t2fnorm").score(IMAGES), expected)
    with pytest.raises(CheckpointError, match="needs a network trained with T2FNorm"):
        Baseline(net, "t2fnorm")


def test_errors_name_the_postprocessor_and_its_arguments(net):
    with pytest.raises(ConfigError, match="'knn': choose from msp, mls, ebo, odin, react, t2fnorm"):
        Baseline(net, "knn")
    with pytest.raises(ConfigError, match=r"takes the arguments \['noise', 'temperature'\]"):
        Baseline(net, "odin", temperature=1000.0)
    with pytest.raises(NotFittedError, match="ReAct has no threshold"):
        Baseline(net, "react", percentile=90.0).score(IMAGES)


@pytest.mark.parametrize(
    ("name", "argument", "values", "interval"),
    [
        ("react", "percentile", [0, 100, 100.5, -1, True, "90", float("nan")], "(0, 100)"),
        ("ebo", "temperature", [0, -1, False, float("inf")], "(0, inf)"),
        ("odin", "noise", [-0.1, float("inf"), None], "[0, inf)"),
    ],
)
def test_arguments_outside_their_interval_are_rejected(net, name, argument, values, interval):
    for value in values:
        args = {**ARGS[name], argument: value}
        message = f"{argument} of {name!r} must be a number in {interval}, got {value!r}"
        with pytest.raises(ConfigError, match=re.escape(message)):
            Baseline(net, name, **args)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [("react", "percentile", 99.9), ("ebo", "temperature", 1), ("odin", "noise", 0)],
)
def test_arguments_at_the_ends_of_their_interval_are_accepted(net, name, argument, value):
    output = Baseline(net, name, **{**ARGS[name], argument: value}).output
    assert value in (output.temperature, output.noise, output.react_percentile)


def test_scores_are_finite_and_larger_for_more_confident_networks():
    net, loader = make_net(), make_loader()
    surer = make_net()
    with torch.no_grad():
        surer.fc.weight *= 3
        surer.fc.bias *= 3
    for name in set(BASELINES) - {"t2fnorm"}:
        args = ARGS.get(name, {})
        less, more = (
            Baseline(n, name, STD, **args).fit(loader).score_loader(loader) for n in (net, surer)
        )
        assert torch.isfinite(less).all()
        assert more.mean() > less.mean()
