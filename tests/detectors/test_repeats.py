"""Calibration images that repeat each other count once; ties of confidences are no repeats."""

import warnings

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.detectors.posthoc import PosthocBaseline
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.conformal import guarantee
from tests.conftest import make_loader

REPEAT = "calibration images repeat others"
DETECTORS = {
    "fusenorm": FuseNorm,
    "joint": lambda net: FuseNorm(net, penalty="joint"),
    "one expert": lambda net: FuseNorm(net, taps=["layer4.0"], strong=["layer4.0"]),
    "msp": lambda net: Baseline(net, "msp"),
    "odin": lambda net: Baseline(net, "odin", temperature=1000.0, noise=0.01),
    "knn": lambda net: PosthocBaseline(net, "knn"),
}


def images(count, seed):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def copies(count, times, seed=3):
    """Images in several copies, in random order."""
    order = torch.randperm(count * times, generator=torch.Generator().manual_seed(seed))
    return images(count, seed).repeat(times, 1, 1, 1)[order]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("count", "times", "batch"), [(20, 9, 7), (31, 2, 62), (25, 4, 1)])
def test_copies_count_once(net, detector, count, times, batch):
    detector = DETECTORS[detector](net).fit(make_loader(60))
    given = TensorDataset(copies(count, times))
    with pytest.warns(UserWarning, match=f"{count * (times - 1)} of {count * times} {REPEAT}"):
        detector.calibrate(DataLoader(given, batch))
    np.testing.assert_allclose(
        detector.reference_, np.sort(detector.score(images(count, 3)).numpy()), rtol=1e-3, atol=1e-4
    )
    assert detector.guarantee(0.9) == guarantee(count, 0.9)
    assert detector.p_values(images(4, 5)).numpy().min() >= 1 / (count + 1)


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_that_differ_are_no_repeats(net, detector):
    detector = DETECTORS[detector](net).fit(make_loader(60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.calibrate([images(400, 4)])
    assert len(detector.reference_) == 400


def test_equal_confidences_are_no_repeats(net):
    """With one output expert whose score is clipped, many images have the largest confidence."""
    detector = FuseNorm(net, strong=["output"], cap=0.0, percentile_high=60.0)
    detector.fit(make_loader(60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.calibrate([images(100, 4)])
    assert len(detector.reference_) == 100
    assert len(np.unique(detector.reference_)) < 90


class Images(torch.utils.data.Dataset):
    """Images in OpenOOD's format."""

    def __init__(self, given):
        self.given = given

    def __len__(self):
        return len(self.given)

    def __getitem__(self, number):
        return {"data": self.given[number], "label": -1}


def test_recorded_copies_count_once(net, tmp_path):
    detector, given = FuseNorm(net).fit(make_loader(60)), Images(copies(20, 3))
    for _ in range(2):  # heard, then read from the store
        with pytest.warns(UserWarning, match=f"40 of 60 {REPEAT}"):
            detector.calibrate(RecordedLoader(given, tmp_path, {"images": "copies"}, "copies", 7))
        assert len(detector.reference_) == 20


def test_many_equal_images_take_little_memory(net):
    detector = FuseNorm(net).fit(make_loader(60))
    given = torch.cat(
        [images(1, 1).expand(20_000, -1, -1, -1)[:, :, :4, :4], images(30, 2)[:, :, :4, :4]]
    )
    with pytest.warns(UserWarning, match=f"19999 of 20030 {REPEAT}"):
        detector.calibrate(DataLoader(TensorDataset(given), 5000))
    assert len(detector.reference_) == 31
