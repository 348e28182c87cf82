"""ID statistics tell what they were fitted with, and give the right numbers or an error."""

import pickle
from dataclasses import replace

import pytest
import torch

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.settings import FUSION_SETTINGS, SETTINGS
from fusenorm_openood.network.structure import read_structure
from tests.nets import BLOCKS, Net, some_images

IMAGES = some_images(40)
NEW = some_images(8, seed=2) * torch.linspace(0.5, 3, 8).view(-1, 1, 1, 1)  # some are unusual
BASE = Settings.published(output="energy", strong=("output", "b.1"))

# Changes of settings that change the experts' scores.
OF_EXPERTS = {
    "taps": ("a.1", "b.1"),
    "k_min": 0.05,
    "k_max": 0.5,
    "alpha": 0.5,
    "eps": 1e-6,
    "output": "msp",
    "temperature": 2.0,
    "noise": 0.1,
    "input_std": (0.5, 0.5, 0.5),
    "react_percentile": 80.0,
    "neighbours": 3,
}
# Changes of settings that only normalise and fuse the scores.
OF_FUSION = {
    "percentile_low": 25.0,
    "percentile_high": 70.0,
    "clip": True,
    "base": 3.0,
    "cap": 0.2,
    "trust": True,
    "normalisation": "standardised",
    "weights": (0.9, 0.1),
    "strong": ("b.1", "output"),
    "penalty": "joint",
    "joint_margin": 0.5,
    "random": "allow",
}


def test_every_setting_is_tried():
    assert {*OF_EXPERTS, *OF_FUSION} == set(SETTINGS)
    assert set(OF_FUSION) == FUSION_SETTINGS


@pytest.fixture(scope="module")
def kept():
    return FuseNorm(Net(), BASE).fit([IMAGES]).id_statistics_


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_a_setting_that_changes_the_scores_is_an_error_that_names_it(kept, name):
    detector = FuseNorm(Net(), BASE.replace(**{name: OF_EXPERTS[name]}))
    with pytest.raises(ConfigError) as caught:
        detector.with_statistics(kept)
    message = str(caught.value)
    assert f"{name} = {OF_EXPERTS[name]!r}, got {getattr(BASE, name)!r}: fit again" in message
    assert not detector.is_fitted
    fresh = detector.fit([IMAGES]).score(NEW)  # the detector is still of use
    assert fresh.isfinite().all()


@pytest.mark.parametrize("name", OF_FUSION)
def test_a_setting_of_the_fusion_gives_the_right_number(kept, name):
    changed, statistics = BASE.replace(**{name: OF_FUSION[name]}), pickle.loads(pickle.dumps(kept))
    before = statistics.statistics
    detector = FuseNorm(Net(), changed).with_statistics(statistics)
    expected = FuseNorm(Net(), changed).fit([IMAGES])
    torch.testing.assert_close(detector.score(NEW), expected.score(NEW))
    assert detector.id_statistics_.settings == changed
    assert statistics.settings == BASE
    assert statistics.statistics is before  # the one that was given is unchanged
    if name not in ("joint_margin", "strong", "random", "trust"):  # which change nothing here
        plain = FuseNorm(Net(), BASE).with_statistics(kept)
        assert not torch.allclose(detector.score(NEW), plain.score(NEW))


def test_strong_experts_that_were_not_scored_are_an_error(kept):
    detector = FuseNorm(Net(), BASE.replace(strong=("output", "fdbd")))
    with pytest.raises(ConfigError, match=r"experts a\.0, .*output, fdbd, got a\.0, .*output: fit"):
        detector.with_statistics(kept)


class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.b.append(type(self.b[1])(8))
        self.eval()


def test_the_statistics_of_a_network_with_other_blocks_is_an_error(kept):
    detector = FuseNorm(Deeper(), BASE, read_structure(Deeper(), IMAGES))
    assert detector.taps == (*BLOCKS, "b.2")
    with pytest.raises(ConfigError, match=r"of this network.*fit again"):
        detector.with_statistics(kept)
    kept = replace(kept, network=None)  # as of a stored run
    with pytest.raises(ConfigError, match=r"experts .*b\.2.* fit again"):
        detector.with_statistics(kept)
    assert not detector.is_fitted
    detector = FuseNorm(Deeper(), BASE).with_statistics(kept)  # its blocks are not known yet
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"experts .*b\.2.* fit again"):
            detector.score(NEW)


def test_statistics_before_the_first_images(kept):
    for settings in (BASE, BASE.replace(base=3.0)):
        detector = FuseNorm(Net(), settings)
        assert detector.experts == ()
        detector.with_statistics(kept)
        assert detector.experts == kept.experts
        expected = FuseNorm(Net(), settings).fit([IMAGES])
        torch.testing.assert_close(detector.score(NEW), expected.score(NEW))
