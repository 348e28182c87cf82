"""Verdicts: calibrate, p-values, is_ood, guarantee, and every error."""

import pickle

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from torch.utils.data import DataLoader, Subset

from fusenorm_openood import FuseNorm
from fusenorm_openood.errors import CalibrationError, ConfigError, NotFittedError
from tests.conftest import assert_undisturbed, make_loader, state_of

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def detector(net, loader):
    return FuseNorm(net).fit(loader).calibrate(make_loader(40, seed=7))


def test_p_values_are_counted_among_the_calibration_confidences(net, loader, detector):
    known = detector.score_loader(make_loader(40, seed=7)).numpy()
    conf = detector.score(IMAGES).numpy()
    expected = [(1 + np.count_nonzero(known <= c)) / 41 for c in conf]
    np.testing.assert_array_equal(detector.p_values(IMAGES).numpy(), expected)
    verdicts = detector.is_ood(IMAGES, acceptance=0.75)
    assert verdicts.dtype == torch.bool
    np.testing.assert_array_equal(verdicts.numpy(), np.array(expected) <= 0.25)


def test_calibration_changes_no_confidence_and_nothing_of_the_network(net, loader):
    detector = FuseNorm(net).fit(loader)
    before, conf = state_of(net), detector.score(IMAGES)
    detector.calibrate(make_loader(40, seed=7))
    assert_undisturbed(net, before)
    assert torch.equal(detector.score(IMAGES), conf)


def test_fit_with_calibration_images_does_both(net, loader, detector):
    both = FuseNorm(net).fit(loader, calibration=make_loader(40, seed=7))
    assert torch.equal(both.p_values(IMAGES), detector.p_values(IMAGES))
    assert both.fit(loader).reference_ is None


def test_one_image_needs_no_batch_dimension(detector):
    assert detector.p_values(IMAGES[2]).shape == ()
    assert bool(detector.is_ood(IMAGES[2], 0.75)) == bool(detector.is_ood(IMAGES, 0.75)[2])
    torch.testing.assert_close(
        detector.score(IMAGES[2]), detector.score(IMAGES)[2], rtol=1e-5, atol=1e-6
    )


def test_single_experts_decide_as_well(net, loader):
    msp = Baseline(net, "msp").calibrate(loader)
    assert msp.guarantee(0.9).images == 60
    assert msp.is_ood(IMAGES, 0.9).shape == (6,)


def test_the_guarantee_is_that_of_the_number_of_calibration_images(detector):
    found = detector.guarantee(0.9, confidence=0.8)
    assert (found.images, found.acceptance, found.confidence) == (40, 0.9, 0.8)
    assert found.average == pytest.approx(1 - 4 / 41)


def test_a_calibrated_detector_pickles(net, detector):
    again = pickle.loads(pickle.dumps(detector))
    assert torch.equal(again.p_values(IMAGES), detector.p_values(IMAGES))


def test_images_of_the_fit_are_no_calibration_images(net, loader):
    detector = FuseNorm(net).fit(loader)
    other = DataLoader(loader.dataset, 7)
    for given in (loader, other):
        with pytest.raises(CalibrationError, match="are among those that the detector"):
            detector.calibrate(given)
    images = torch.cat([images for images, _ in loader])
    for copied in ([images.clone()], DataLoader(Subset(loader.dataset, range(30)), 8)):
        with pytest.raises(CalibrationError, match="calibration images are among those"):
            detector.calibrate(copied)
    with pytest.raises(CalibrationError, match="are among those"):
        FuseNorm(net).fit([images], calibration=[images])


def test_before_fit_and_before_calibrate(net, loader):
    with pytest.raises(NotFittedError):
        FuseNorm(net).calibrate(loader)
    detector = FuseNorm(net).fit(loader)
    for call in (detector.p_values, detector.is_ood):
        with pytest.raises(CalibrationError, match="call calibrate"):
            call(IMAGES)
    with pytest.raises(CalibrationError, match="call calibrate"):
        detector.guarantee()


def test_an_acceptance_that_cannot_be_had(detector):
    with pytest.raises(CalibrationError, match=r"acceptance=0\.99 needs at least 99 .* got 40"):
        detector.is_ood(IMAGES, 0.99)
    with pytest.raises(ConfigError, match="acceptance must be"):
        detector.is_ood(IMAGES, 95)


def test_to_moves_the_network_and_the_detector_follows(net, detector):
    conf = detector.score(IMAGES)
    assert detector.to("cpu") is detector
    assert detector.net is net
    assert torch.equal(detector.score(IMAGES), conf)
    detector.to("meta")
    assert all(parameter.is_meta for parameter in net.parameters())
    with pytest.raises(ConfigError, match=r"device 'gpu9' cannot be used .*: choose auto or cpu"):
        detector.to("gpu9")


def test_class_names_are_as_many_as_the_classes(net, loader):
    detector = FuseNorm(net)
    detector.class_names = ["one", "two"]  # how many are needed is not known yet
    with pytest.raises(ConfigError, match="class_names must be the names of 4 classes, got 2"):
        FuseNorm.fit(detector, loader)
    names = [f"class {number}" for number in range(4)]
    detector.class_names = names
    detector.fit(loader)
    assert detector.class_names == tuple(names)
    with pytest.raises(ConfigError, match="the names of 4 classes, got 5"):
        detector.class_names = [*names, "one more"]
    assert detector.class_names == tuple(names)
