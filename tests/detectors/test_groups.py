"""Calibration by groups, merged calibrations, and what a detector and its file say of them."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import CalibrationError, ConfigError, DataError, NonFiniteError
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.report.files import report_of_files
from tests.conftest import make_loader, make_net
from tests.nets import CLASSES, Net, listed, some_images

LEAST = 12
FIT, OTHER, NEW = some_images(60), some_images(90, seed=5), some_images(20, seed=8)
POOLED = f"groups by predicted have fewer than {LEAST} calibration images"


@pytest.fixture(scope="module")
def fitted():
    """A fitted detector, whose network predicts several classes."""
    net = Net()
    with torch.no_grad():
        net.fc.bias -= net(FIT).mean(0)
    return FuseNorm(net).fit([FIT])


@pytest.fixture
def detector(fitted):
    return pickle.loads(pickle.dumps(fitted))


def by_hand(conf, group, tested, of, least=LEAST):
    """p-values, one image at a time."""
    counts = np.bincount(group, minlength=CLASSES)
    p = []
    for c, g in zip(tested, of, strict=True):
        cell = conf[group == g]
        if counts[g] < least:
            cell = conf[np.isin(group, np.flatnonzero(counts <= least))]
            cell = cell if len(cell) >= least else conf
        p.append((1 + (cell <= c).sum()) / (len(cell) + 1))
    return np.array(p)


def test_images_are_compared_with_those_of_their_predicted_class(detector, tmp_path):
    with pytest.warns(UserWarning, match=POOLED):
        detector.calibrate([OTHER], by="predicted", least=LEAST)
    (group, conf), (of, tested) = map(detector.predict, (OTHER, NEW))
    assert len(set(of.tolist())) > 1
    expected = by_hand(*(t.numpy() for t in (conf, group, tested, of)))
    detector.save(tmp_path / "d")
    copies = pickle.loads(pickle.dumps(detector)), FuseNorm.load(tmp_path / "d", detector.net)
    for same in (detector, *copies):
        np.testing.assert_array_equal(same.p_values(NEW).numpy(), expected)
        np.testing.assert_array_equal(same.explain(NEW, with_maps=False).p_values, expected)
        assert same.is_ood(NEW, 0.9).tolist() == (expected <= 0.1 + 1e-12).tolist()
        assert same.p_values(NEW[3]).item() == expected[3]
        assert repr(same) == repr(detector)
    assert "calibrated on 90 by predicted (90 from list, 20" in repr(detector)
    with pytest.raises(ConfigError, match="by predicted, not by given groups: leave out groups"):
        detector.p_values(NEW, groups=of)


def test_every_class_of_the_network_has_a_group_and_a_guarantee(detector):
    detector.class_names = [f"class {number}" for number in range(CLASSES)]
    with pytest.warns(UserWarning, match=f"{POOLED}.* alone: class "):
        detector.calibrate([OTHER], by="predicted", least=LEAST)
    assert detector.calibration_.names == tuple(map(str, range(CLASSES)))
    largest = int(detector.calibration_.counts.argmax())
    found = detector.guarantee(0.9, group=f"class {largest}")
    assert found == detector.guarantee(0.9, group=largest)
    assert found.images == detector.calibration_.counts[largest]
    with pytest.raises(ConfigError, match="unknown group 'class 9'"):
        detector.guarantee(0.9, group="class 9")
    with pytest.raises(CalibrationError, match="needs at least 99 calibration images"):
        detector.is_ood(NEW, 0.99)


@pytest.mark.parametrize("score", ["fusenorm", "msp"])
def test_recorded_images_have_the_same_groups(fitted, tmp_path, score):
    detector = SingleScore(fitted.net, "msp") if score == "msp" else fitted
    p = []
    for _ in range(2):  # scored, then read from the store
        given = RecordedLoader(listed(OTHER), tmp_path, {"images": 1}, "other", 90)
        detector = pickle.loads(pickle.dumps(detector))
        with pytest.warns(UserWarning, match=POOLED):
            detector.calibrate(given, by="predicted", least=LEAST)
        p.append(detector.p_values(NEW).tolist())
    with pytest.warns(UserWarning, match=POOLED):
        detector.calibrate([OTHER], by="predicted", least=LEAST)
    assert p == [detector.p_values(NEW).tolist()] * 2
    with pytest.raises(DataError, match="as a key of batches that are dicts, got"):
        detector.calibrate(given, by="camera")


CAMERAS = ["left"] * 40 + ["right"] * 50


def with_cameras(images, cameras, size=16):
    steps = range(0, len(images), size)
    return [{"image": images[i : i + size], "camera": cameras[i : i + size]} for i in steps]


def test_groups_that_a_loader_gives(detector, tmp_path):
    detector.calibrate(with_cameras(OTHER, CAMERAS), by="camera")
    conf, tested = detector.score(OTHER).numpy(), detector.score(NEW).numpy()
    of = [("left", "right")[number % 2] for number in range(20)]
    group, numbers = np.repeat([0, 1], [40, 50]), np.arange(20) % 2
    expected = by_hand(conf, group, tested, numbers)
    detector.save(tmp_path / "d")
    for same in (detector, FuseNorm.load(tmp_path / "d", detector.net)):
        np.testing.assert_array_equal(same.p_values(NEW, of).numpy(), expected)
        assert same.p_values(NEW[1], "right").item() == expected[1]
        assert same.is_ood(NEW, 0.9, of).tolist() == (expected <= 0.1 + 1e-12).tolist()
        assert same.guarantee(0.9, group="left").images == 40
    for wrong, message in (
        (None, "the camera of 20 images, got 0"),
        (["left"] * 3, "the camera of 20 images, got 3"),
        (["top"] * 20, "unknown group 'top': choose from left, right"),
    ):
        with pytest.raises(ConfigError, match=message):
            detector.is_ood(NEW, groups=wrong)
    before = detector.p_values(NEW, of)
    for loader, message in (
        ([OTHER], "'camera', which a loader must give as a key"),
        ([{"image": OTHER, "camera": ["left"]}], "one 'camera' for each image, got 1"),
    ):
        with pytest.raises(DataError, match=message):
            detector.calibrate(loader, by="camera")
    assert torch.equal(detector.p_values(NEW, of), before)


def brightness(images, pred):
    return (images.mean((1, 2, 3)) > 0).int()


def test_groups_that_a_function_gives(detector, tmp_path):
    detector.calibrate([OTHER], by=brightness)
    conf, tested, of = detector.score(OTHER), detector.score(NEW), brightness(NEW, None)
    expected = by_hand(conf.numpy(), brightness(OTHER, None).numpy(), tested.numpy(), of.numpy())
    np.testing.assert_array_equal(detector.p_values(NEW).numpy(), expected)
    np.testing.assert_array_equal(detector.explain(NEW, with_maps=False).p_values, expected)
    for early in (False, True):
        assert detector.is_ood(NEW, 0.9, early=early).tolist() == (expected <= 0.1).tolist()
    np.testing.assert_array_equal(copy.deepcopy(detector).p_values(NEW).numpy(), expected)
    detector.save(tmp_path / "d")
    for same in (pickle.loads(pickle.dumps(detector)), FuseNorm.load(tmp_path / "d", detector.net)):
        np.testing.assert_array_equal(same.p_values(NEW, of).numpy(), expected)
        with pytest.raises(ConfigError, match=r"the brightness\(\) of 20 images, got 0"):
            same.p_values(NEW)
    with pytest.raises(DataError, match="a group for each of 90 images, got 1"):
        detector.calibrate([OTHER], by=lambda images, pred: pred[:1])
    with pytest.raises(DataError, match="leave out the store"):
        given = RecordedLoader(listed(OTHER), tmp_path, {"images": 1}, "other", 90)
        detector.calibrate(given, by=brightness)


def test_a_function_is_given_finite_images_only(detector):
    images, given = OTHER.clone(), []
    images[30, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"image 10 of the batch .* contains NaN"):
        detector.calibrate(images.split(20), by=lambda x, pred: given.append(x) or pred)
    assert [len(x) for x in given] == [20]


def test_labels_as_groups(detector):
    labels = torch.arange(90) % 3
    detector.calibrate([(OTHER, labels)], by="label")
    conf, tested = detector.score(OTHER).numpy(), detector.score(NEW).numpy()
    of = torch.arange(20) % 3
    expected = by_hand(conf, labels.numpy(), tested, of.numpy())
    np.testing.assert_array_equal(detector.p_values(NEW, of).numpy(), expected)
    with pytest.raises(DataError, match="needs a loader that gives labels"):
        detector.calibrate([OTHER], by="label")


@pytest.mark.parametrize("by", [None, "predicted"])
def test_merged_images_count_once_and_the_oldest_go_first(detector, by, tmp_path):
    def calibrate(images, **how):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            detector.calibrate([images], by=by, least=1, **how)
        return [str(w.message) for w in told if "repeat others" in str(w.message)]

    assert calibrate(OTHER[:50], source="old") == []
    (repeats,) = calibrate(OTHER[40:], merge=True, source="new")
    assert repeats.startswith("10 of 100 calibration images repeat others")
    merged = detector.p_values(NEW)
    detector.save(tmp_path / "d")
    loaded = FuseNorm.load(tmp_path / "d", detector.net)
    assert [c[1:] for c in loaded.calibration_.history] == [(50, "old"), (40, "new")]
    assert loaded.calibration_.history == detector.calibration_.history
    calibrate(OTHER)
    assert torch.equal(detector.p_values(NEW), merged)
    detector = loaded
    calibrate(some_images(20, seed=9), merge=True, newest=60, source="newest")
    assert [c[1:] for c in detector.calibration_.history] == [(40, "new"), (20, "newest")]
    window = torch.cat([OTHER[50:], some_images(20, seed=9)])
    p = detector.p_values(NEW)
    calibrate(window)
    assert torch.equal(detector.p_values(NEW), p)
    with pytest.raises(ConfigError, match="cannot be merged with new ones grouped by"):
        detector.calibrate([(NEW, np.zeros(20, int))], by="label", merge=True)
    assert torch.equal(detector.p_values(NEW), p)


def test_other_weights_make_the_fit_and_the_calibration_stale(detector, tmp_path):
    detector.calibrate([OTHER]).save(tmp_path / "d")
    net = pickle.loads(pickle.dumps(detector.net))
    with torch.no_grad():
        net.fc.weight[0] += 0.5
    with pytest.warns(UserWarning, match="the fit and the calibration are stale"):
        loaded = FuseNorm.load(tmp_path / "d", net, strict=False)
    assert "with other weights" in repr(loaded)
    with pytest.raises(CalibrationError, match="scored by other weights, and cannot be merged"):
        loaded.calibrate([NEW], merge=True)
    loaded.calibrate([OTHER], source="again").save(tmp_path / "again")
    assert "with other weights" not in repr(loaded)
    # The p-values in the file are those of the new weights alone.
    again = FuseNorm.load(tmp_path / "again", net)
    assert torch.equal(again.p_values(NEW), loaded.p_values(NEW))
    with pytest.warns(UserWarning, match="the fit and the calibration are stale"):
        FuseNorm.load(tmp_path / "again", detector.net, strict=False)


@pytest.mark.parametrize("wrong", [{"least": 0}, {"newest": 0}])
def test_numbers_below_1_are_errors(detector, wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be >= 1, got 0"):
        detector.calibrate([OTHER], **wrong)


def test_the_data_set_is_where_images_are_from(detector):
    loader = torch.utils.data.DataLoader(TensorDataset(OTHER, torch.zeros(90)), 16)
    assert detector.calibrate(loader).calibration_.history[0].source == "TensorDataset"


def test_classes_of_one_name_are_told_by_their_numbers():
    detector = FuseNorm(make_net(classes=4)).fit(make_loader(200))
    detector.class_names = ("a", "crane", "crane", "b")
    detector.calibrate(make_loader(300, seed=2), by="predicted", least=9)
    calibration = detector.calibration_
    assert [detector.threshold(0.8, k) for k in range(4)] == list(calibration.thresholds(0.8))
    with pytest.raises(ConfigError, match=r"several .*'crane'"):
        detector.threshold(0.8, "crane")
    pred, conf = (t.numpy() for t in detector.predict(next(iter(make_loader(40, seed=3)))[0]))
    p = calibration.p_values(conf, pred)
    rows = [
        Judged(str(n), detector.class_names[k], float(c), float(q), bool(q <= 0.2))
        for n, (k, c, q) in enumerate(zip(pred, conf, p, strict=True))
    ]
    detector.preprocessing = Preprocessing(16, (16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert report_of_files(detector, rows, 0.8, ()).sections


def test_groups_that_cannot_be_merged_are_told_before_images_are_read():
    detector = FuseNorm(make_net()).fit(make_loader(60)).calibrate(make_loader(40, seed=2))

    class Read:
        def __iter__(self):
            raise AssertionError("was read")

    with pytest.raises(ConfigError, match="cannot be merged"):
        detector.calibrate(Read(), by="predicted", merge=True)
