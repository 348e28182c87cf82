"""Calibration: p-values, verdicts, what they promise, and images that repeat each other."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import CalibrationError, ConfigError, NotFittedError
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.conformal import guarantee
from tests.conftest import assert_undisturbed, make_loader, state_of
from tests.nets import Net, listed, some_images

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(9))
REPEAT = "calibration images repeat others"
AMONG = "calibration images are among those"
DETECTORS = {
    "fusenorm": FuseNorm,
    "one expert": lambda net: FuseNorm(net, taps=["b.0"], strong=["b.0"]),
    "msp": lambda net: SingleScore(net, "msp"),
    "odin": lambda net: SingleScore(net, "odin", noise=0.01),
    "knn": lambda net: SingleScore(net, "knn"),
}


@pytest.fixture
def detector(net, loader):
    return FuseNorm(net).fit(loader).calibrate(make_loader(40, seed=7))


@pytest.fixture(scope="module")
def small():
    """A detector of a small network that a test may calibrate, but not fit."""
    return FuseNorm(Net()).fit([some_images(60)])


def test_p_values_are_counted_among_the_calibration_confidences(net, detector):
    known = detector.score_loader(make_loader(40, seed=7)).numpy()
    conf = detector.score(IMAGES).numpy()
    expected = np.array([(1 + np.count_nonzero(known <= c)) / 41 for c in conf])
    for same in (detector, pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(same.p_values(IMAGES).numpy(), expected)
    verdicts = detector.is_ood(IMAGES, acceptance=0.75)
    assert verdicts.dtype == torch.bool
    np.testing.assert_array_equal(verdicts.numpy(), expected <= 0.25)
    # One image needs no batch dimension.
    assert detector.p_values(IMAGES[2]).shape == ()
    assert bool(detector.is_ood(IMAGES[2], 0.75)) == bool(verdicts[2])
    torch.testing.assert_close(detector.score(IMAGES[2]).item(), conf[2], rtol=1e-5, atol=1e-6)


def test_calibration_changes_no_confidence_and_nothing_of_the_network(net, loader):
    detector = FuseNorm(net).fit(loader)
    before, conf = state_of(net), detector.score(IMAGES)
    detector.calibrate(make_loader(40, seed=7))
    assert_undisturbed(net, before)
    assert torch.equal(detector.score(IMAGES), conf)
    both = FuseNorm(net).fit(loader, calibration=make_loader(40, seed=7))
    assert torch.equal(both.p_values(IMAGES), detector.p_values(IMAGES))
    assert both.fit(loader).calibration_scores_ is None


def test_the_guarantee_is_that_of_the_number_of_calibration_images(net, loader, detector):
    found = detector.guarantee(0.9, confidence=0.8)
    assert (found.images, found.acceptance, found.confidence) == (40, 0.9, 0.8)
    assert found.average == pytest.approx(1 - 4 / 41)
    with pytest.raises(CalibrationError, match=r"acceptance=0\.99 needs at least 99 .* got 40"):
        detector.is_ood(IMAGES, 0.99)
    with pytest.raises(ConfigError, match="acceptance must be"):
        detector.is_ood(IMAGES, 95)
    with pytest.raises(ConfigError, match="not by groups: leave out group"):
        detector.guarantee(0.9, group=3)
    msp = SingleScore(net, "msp").calibrate(loader)
    assert msp.guarantee(0.9).images == 60
    assert msp.is_ood(IMAGES, 0.9).shape == (6,)


def test_before_fit_and_before_calibrate(net, loader):
    with pytest.raises(NotFittedError):
        FuseNorm(net).calibrate(loader)
    detector = FuseNorm(net).fit(loader)
    for call in (detector.p_values, detector.is_ood, lambda images: detector.guarantee()):
        with pytest.raises(CalibrationError, match="call calibrate"):
            call(IMAGES)


def test_images_of_the_fit_are_no_calibration_images(net, loader):
    detector = FuseNorm(net).fit(loader)
    images = torch.cat([images for images, _ in loader])
    half = DataLoader(Subset(loader.dataset, range(30)), 8)
    for given in (loader, DataLoader(loader.dataset, 7), [images.clone()], half):
        with pytest.raises(CalibrationError, match=AMONG):
            detector.calibrate(given)
    with pytest.raises(CalibrationError, match=AMONG):
        FuseNorm(net).fit([images], calibration=[images])


@pytest.mark.parametrize("repeated", [10, 11])
def test_a_tenth_of_the_calibration_images_may_look_like_images_of_the_fit(small, repeated):
    given = [torch.cat([some_images(60)[:repeated], some_images(100 - repeated, seed=7)])]
    if repeated == 10:
        assert len(small.calibrate(given).calibration_scores_) == 100
    else:
        with pytest.raises(CalibrationError, match=f"11 of 100 {AMONG}"):
            small.calibrate(given)


class Unread(TensorDataset):
    def __getitem__(self, number):
        raise AssertionError("an image was read")


def unread(numbers, torchvision=False):
    data = Unread(torch.randn(len(numbers), 3, 16, 16))
    if torchvision:
        data.samples = [(f"folder/../images/{n}.png", 0) for n in numbers]
    else:
        data.paths = [f"images/{n}.png" for n in numbers]
    return data


WHOLE = Unread(torch.randn(60, 3, 16, 16))
OVERLAPS = {
    "paths": (unread(range(40)), unread(range(39, 60))),
    "samples": (unread(range(40), torchvision=True), unread(range(39, 60))),
    "subsets": (Subset(WHOLE, range(40)), Subset(WHOLE, range(39, 60))),
    "same": (WHOLE, WHOLE),
}


@pytest.mark.parametrize("how", OVERLAPS)
def test_overlaps_are_refused_before_the_fit(small, how):
    fit, calibration = OVERLAPS[how]
    before = small.score(IMAGES)
    with pytest.raises(CalibrationError, match=AMONG):
        small.fit(DataLoader(fit, 8), calibration=DataLoader(calibration, 8))
    assert torch.equal(small.score(IMAGES), before)


def test_disjoint_parts_of_a_data_set_are_no_overlap():
    whole = ConcatDataset([TensorDataset(some_images(120))])
    fit, calibration = (DataLoader(Subset(whole, n), 16) for n in (range(60), range(60, 120)))
    detector = FuseNorm(Net()).fit(fit, calibration=calibration)
    assert len(detector.calibration_scores_) == 60


def copies(count, times):
    """Images in several copies, in random order."""
    order = torch.randperm(count * times, generator=torch.Generator().manual_seed(3))
    return some_images(count, seed=3).repeat(times, 1, 1, 1)[order]


@pytest.mark.parametrize("kind", DETECTORS)
def test_copies_count_once_and_images_that_differ_are_no_copies(kind):
    detector = DETECTORS[kind](Net()).fit([some_images(60)])
    for count, times, batch in ((20, 9, 7), (31, 2, 62)):
        given = DataLoader(TensorDataset(copies(count, times)), batch)
        with pytest.warns(UserWarning, match=f"{count * (times - 1)} of {count * times} {REPEAT}"):
            detector.calibrate(given)
        expected = np.sort(detector.score(some_images(count, seed=3)).numpy())
        found = detector.calibration_scores_
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        assert detector.guarantee(0.9) == guarantee(count, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.calibrate([some_images(400, seed=4)])
    assert len(detector.calibration_scores_) == 400


def test_equal_confidences_are_no_repeats():
    """With one output expert whose score is clipped, many images have the largest confidence."""
    detector = FuseNorm(Net(), strong=["output"], cap=0.0, percentile_high=60.0)
    detector.fit([some_images(60)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.calibrate([some_images(100, seed=4)])
    assert len(detector.calibration_scores_) == 100
    assert len(np.unique(detector.calibration_scores_)) < 90


def test_recorded_copies_count_once(small, tmp_path):
    for _ in range(2):  # scored, then read from the store
        given = RecordedLoader(listed(copies(20, 3)), tmp_path, {"images": 1}, "copies", 7)
        with pytest.warns(UserWarning, match=f"40 of 60 {REPEAT}"):
            small.calibrate(given)
        assert len(small.calibration_scores_) == 20


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
        detector.fit(loader)
    names = [f"class {number}" for number in range(4)]
    detector.class_names = names
    detector.fit(loader)
    with pytest.raises(ConfigError, match="the names of 4 classes, got 5"):
        detector.class_names = [*names, "one more"]
    assert detector.class_names == tuple(names)
