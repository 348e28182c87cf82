"""A fit or a calibration that fails leaves the detector as it was."""

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.detectors.posthoc import PosthocBaseline
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from fusenorm_openood import FuseNorm, FuseNormPostprocessor
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.errors import CalibrationError, FuseNormError
from fusenorm_openood.method.settings import Settings
from tests.conftest import make_loader
from tests.without_openood.test_postprocessor import config

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(9))
DETECTORS = {
    "fusenorm": FuseNorm,
    "published": lambda net: FuseNorm(net, Settings.published()),
    "react": lambda net: Baseline(net, "react", percentile=90.0),
    "knn": lambda net: PosthocBaseline(net, "knn"),
    "mds": lambda net: PosthocBaseline(net, "mds"),
}


def broken():
    return [images for images, _ in make_loader(20)] + [torch.full((4, 3, 16, 16), float("nan"))]


class Interrupted:
    def __iter__(self):
        yield IMAGES
        raise KeyboardInterrupt


FAILING = {
    "no images": list,
    "not finite": broken,
    "interrupted": Interrupted,
    "no batches": lambda: [torch.randn(3)],
}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("failing", FAILING)
def test_a_fit_that_fails_changes_nothing(net, detector, failing):
    detector = DETECTORS[detector](net)
    with pytest.raises((FuseNormError, KeyboardInterrupt)):
        detector.fit(FAILING[failing]())
    assert not detector.is_fitted
    detector.fit(make_loader(60)).calibrate(make_loader(40, seed=7))
    before, p = detector.score(IMAGES), detector.p_values(IMAGES)
    for learn in (detector.fit, detector.calibrate):
        with pytest.raises((FuseNormError, KeyboardInterrupt)):
            learn(FAILING[failing]())
        assert torch.equal(detector.score(IMAGES), before)
        assert torch.equal(detector.p_values(IMAGES), p)


def test_equal_images_change_nothing(net):
    detector = FuseNorm(net).fit(make_loader(60)).calibrate(make_loader(40, seed=7))
    before = detector.p_values(IMAGES)
    with pytest.raises(FuseNormError):
        detector.fit([IMAGES[:1].repeat(4, 1, 1, 1)])
    assert torch.equal(detector.p_values(IMAGES), before)


def test_a_calibration_in_fit_that_fails_changes_nothing(net):
    detector = FuseNorm(net).fit(make_loader(60)).calibrate(make_loader(40, seed=7))
    before = detector.p_values(IMAGES)
    with pytest.raises(FuseNormError):
        detector.fit(make_loader(50, seed=3), calibration=broken())
    assert torch.equal(detector.p_values(IMAGES), before)
    detector.fit(make_loader(50, seed=3), calibration=make_loader(30, seed=4))
    assert len(detector.reference_) == 30
    assert not torch.equal(detector.p_values(IMAGES), before)


def test_a_fit_takes_the_place_of_an_earlier_one(net):
    detector, loader = FuseNorm(net).fit(make_loader(60)), make_loader(50, seed=3)
    assert detector.calibrate(make_loader(40, seed=7)).fit(loader) is detector
    assert torch.equal(detector.score(IMAGES), FuseNorm(net).fit(loader).score(IMAGES))
    assert detector.reference_ is None


def test_a_bank_whose_fit_fails_keeps_its_scores(net):
    loader = make_loader(60)
    bank = ScoreBank(net, [Settings()]).fit(loader)
    before = bank.scored(Settings(), loader).conf
    with pytest.raises(FuseNormError):
        bank.fit(broken())
    np.testing.assert_array_equal(bank.scored(Settings(), loader).conf, before)


@pytest.mark.parametrize("sweep", [None, {"base": [2, 20]}])
def test_a_setup_that_fails_changes_nothing(net, sweep):
    postprocessor = FuseNormPostprocessor(config(sweep))
    with pytest.raises(FuseNormError):
        postprocessor.setup(net, {"val": broken()}, {})
    assert not postprocessor.setup_flag
    postprocessor.setup(net, {"val": make_loader(60)}, {})
    conf = postprocessor.postprocess(net, IMAGES)[1]
    if sweep:
        settings = postprocessor.settings
        with pytest.raises(FuseNormError):
            postprocessor.set_hyperparam([-1])
        assert postprocessor.settings == settings
    assert torch.equal(postprocessor.postprocess(net, IMAGES)[1], conf)


class Unread(TensorDataset):
    def __getitem__(self, number):
        raise AssertionError("an image was read")


def files(cls, paths, numbers):
    data = cls(torch.randn(len(numbers), 3, 16, 16))
    if cls is Unread and paths == "samples":
        data.samples = [(f"folder/../images/{n}.png", 0) for n in numbers]
    else:
        data.paths = [f"images/{n}.png" for n in numbers]
    return data


@pytest.mark.parametrize("how", ["paths", "samples", "subsets", "same"])
def test_overlaps_are_refused_before_the_fit(net, how):
    whole = Unread(torch.randn(60, 3, 16, 16))
    fit, calibration = {
        "paths": lambda: (files(Unread, "paths", range(40)), files(Unread, "paths", range(39, 60))),
        "samples": lambda: (
            files(Unread, "samples", range(40)),
            files(Unread, "paths", range(39, 60)),
        ),
        "subsets": lambda: (Subset(whole, range(40)), Subset(whole, range(39, 60))),
        "same": lambda: (whole, whole),
    }[how]()
    detector = FuseNorm(net).fit(make_loader(60))
    before = detector.score(IMAGES)
    with pytest.raises(CalibrationError, match="calibration images are among those"):
        detector.fit(DataLoader(fit, 8), calibration=DataLoader(calibration, 8))
    assert torch.equal(detector.score(IMAGES), before)


def test_disjoint_parts_of_a_data_set_are_no_overlap(net):
    whole = ConcatDataset([TensorDataset(torch.randn(120, 3, 16, 16))])
    fit, calibration = Subset(whole, range(60)), Subset(whole, range(60, 120))
    detector = FuseNorm(net).fit(DataLoader(fit, 16), calibration=DataLoader(calibration, 16))
    assert len(detector.reference_) == 60
