"""Progress bars: one for each pass over a loader, and none unless they are asked for."""

import re

import pytest
from fusenorm_openood.detectors.baselines import Baseline

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.search import search

ENERGY = Settings.published(output="energy")


def react(net, loader, **progress):
    Baseline(net, "react", percentile=90.0).fit(loader, **progress)


def searched(net, loader, **progress):
    search(net, ENERGY, {"base": [2]}, loader, list(loader), **progress)


@pytest.mark.parametrize(
    ("work", "bars"),
    [
        (lambda net, loader, **p: FuseNorm(net).fit(loader, **p), ["fit"]),
        (lambda net, loader, **p: FuseNorm(net, ENERGY).fit(loader, **p), ["ReAct", "fit"]),
        (lambda net, loader, **p: Baseline(net, "msp").score_loader(loader, **p), ["score"]),
        (lambda net, loader, **p: Baseline(net, "msp").infer(loader, desc="svhn", **p), ["svhn"]),
        (react, ["ReAct"]),
        (searched, ["ReAct", "APS", "APS"]),
    ],
)  # fmt: skip
def test_every_pass_has_a_bar_on_request(net, loader, work, bars, capsys):
    work(net, loader)
    assert capsys.readouterr().err == ""
    work(net, loader, progress=True)
    assert re.findall(r"(\w+):   0%", capsys.readouterr().err) == bars
