"""A fit or a calibration that fails leaves the detector as it was."""

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm, FuseNormPostprocessor
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.method.settings import Settings
from tests.conftest import make_loader
from tests.nets import Net, some_images
from tests.without_openood.test_postprocessor import config

IMAGES = some_images(6, seed=9)
KNOWN, CALIBRATION = [some_images(60)], [some_images(40, seed=7)]
DETECTORS = {
    "fusenorm": FuseNorm,
    "published": lambda net: FuseNorm(net, Settings.published(strong=("output",))),
    "react": lambda net: SingleScore(net, "react"),
    "knn": lambda net: SingleScore(net, "knn"),
    "mds++": lambda net: SingleScore(net, "mds++"),
}
BROKEN = [some_images(20, seed=3), torch.full((4, 3, 12, 12), float("nan"))]


class Interrupted:
    def __iter__(self):
        yield IMAGES
        raise KeyboardInterrupt


FAILING = {
    "no images": [],
    "not finite": BROKEN,
    "interrupted": Interrupted(),
    "no batches": [torch.randn(3)],
}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("failing", FAILING)
def test_a_fit_that_fails_changes_nothing(detector, failing):
    detector = DETECTORS[detector](Net())
    with pytest.raises((FuseNormError, KeyboardInterrupt)):
        detector.fit(FAILING[failing])
    assert not detector.is_fitted
    detector.fit(KNOWN).calibrate(CALIBRATION)
    before, p = detector.score(IMAGES), detector.p_values(IMAGES)
    for learn in (detector.fit, detector.calibrate):
        with pytest.raises((FuseNormError, KeyboardInterrupt)):
            learn(FAILING[failing])
        assert torch.equal(detector.score(IMAGES), before)
        assert torch.equal(detector.p_values(IMAGES), p)


def test_equal_images_or_a_failing_calibration_in_fit_change_nothing():
    detector, other = FuseNorm(Net()).fit(KNOWN).calibrate(CALIBRATION), [some_images(50, seed=3)]
    before = detector.p_values(IMAGES)
    for wrong in ({"loader": [IMAGES[:1].repeat(4, 1, 1, 1)]}, {"calibration": BROKEN}):
        with pytest.raises(FuseNormError):
            detector.fit(**{"loader": other, **wrong})
        assert torch.equal(detector.p_values(IMAGES), before)
    detector.fit(other, calibration=[some_images(30, seed=4)])
    assert len(detector.calibration_scores_) == 30
    assert not torch.equal(detector.p_values(IMAGES), before)


def test_a_bank_whose_fit_fails_keeps_its_scores():
    bank = ScoreBank(Net(), [Settings()]).fit(KNOWN)
    before = bank.scored(Settings(), KNOWN).conf
    with pytest.raises(FuseNormError):
        bank.fit(BROKEN)
    np.testing.assert_array_equal(bank.scored(Settings(), KNOWN).conf, before)


@pytest.mark.parametrize("sweep", [None, {"base": [2, 20]}])
def test_a_setup_that_fails_changes_nothing(net, sweep):
    postprocessor = FuseNormPostprocessor(config(sweep))
    with pytest.raises(FuseNormError):
        postprocessor.setup(net, {"val": BROKEN}, {})
    assert not postprocessor.setup_flag
    postprocessor.setup(net, {"val": make_loader(60)}, {})
    conf = postprocessor.postprocess(net, IMAGES)[1]
    if sweep:
        settings = postprocessor.settings
        with pytest.raises(FuseNormError):
            postprocessor.set_hyperparam([-1])
        assert postprocessor.settings == settings
    assert torch.equal(postprocessor.postprocess(net, IMAGES)[1], conf)
