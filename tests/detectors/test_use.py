"""A detector as users of other libraries expect it."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone, is_outlier_detector
from sklearn.exceptions import NotFittedError
from sklearn.metrics import get_scorer, roc_auc_score
from sklearn.utils.validation import check_is_fitted
from torchvision.models import resnet18

from fusenorm_openood import FuseNorm
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import CalibrationError, ConfigError, DataError
from tests.conftest import make_net
from tests.nets import some_images

SIZE = (16, 16)


@pytest.fixture(scope="module")
def detector() -> FuseNorm:
    preprocessing = Preprocessing(18, SIZE, "bilinear", (0.5,) * 3, (0.2,) * 3)
    found = FuseNorm(make_net(), preprocessing=preprocessing).fit([some_images(80, SIZE)])
    return found.calibrate([some_images(60, SIZE, seed=2)])


def test_images_in_any_form_have_one_confidence(detector, tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for array, path in zip(arrays, paths, strict=True):
        Image.fromarray(array).save(path)
    wanted = torch.stack([detector.score(path) for path in paths])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    mixed = [str(paths[0]), Image.fromarray(arrays[1]), pixels[2]]
    for images in (paths, tuple(paths), arrays, list(arrays), pixels, mixed):
        torch.testing.assert_close(detector.score(images), wanted, rtol=1e-4, atol=1e-4)
    assert detector.score(arrays[0]).shape == ()
    grey = arrays[0, :, :, 0]
    torch.testing.assert_close(detector.score(grey), detector.score(grey[..., None]))
    with pytest.raises(DataError, match=r"\[20, 24, 4\]"):
        detector.score(np.zeros((20, 24, 4), np.uint8))


@pytest.mark.parametrize(
    "images",
    [
        Image.new("RGB", (0, 4)),
        np.zeros((5, 0), np.uint8),
        np.zeros((2, 0, 5, 3), np.uint8),
        torch.zeros(1, 0, 0, dtype=torch.uint8),
        torch.zeros(2, 3, 0, 5, dtype=torch.uint8),
    ],
)
def test_images_without_pixels_are_refused(detector, images):
    with pytest.raises(DataError, match="no pixels"):
        detector.score(images)


def test_what_is_no_preprocessing_is_told(detector):
    other = copy.copy(detector)
    other.preprocessing = (224, 224)
    with pytest.raises(DataError, match="must be a Preprocessing, got tuple"):
        other.score(np.zeros((9, 9, 3), np.uint8))


def test_thresholds_are_where_verdicts_change(detector):
    images = some_images(60, SIZE, seed=2)  # those of the calibration: ties with the threshold
    for acceptance in (0.5, 0.8, 0.95):
        limit = detector.threshold(acceptance)
        assert np.isin(limit, detector.calibration_scores_)
        wanted = detector.is_ood(images, acceptance)
        assert torch.equal(wanted, torch.from_numpy(detector.decision_function(images) < limit))
    with pytest.raises(CalibrationError, match="99"):
        detector.threshold(0.99)
    with pytest.raises(CalibrationError, match="calibrate"):
        FuseNorm(make_net()).fit([some_images(80, SIZE)]).threshold()


def test_scikit_learn_clones_a_detector_and_changes_its_settings(detector):
    copy = clone(FuseNorm(make_net(), cap=5, strong=["output", "knn"], weights=[0.2, 0.8]))
    assert not copy.is_fitted
    assert (copy.settings.cap, copy.settings.strong) == (5, ("output", "knn"))
    found = clone(detector).fit([some_images(80, SIZE)])
    images = some_images(40, SIZE, seed=4) * torch.linspace(1, 6, 40)[:, None, None, None]
    assert np.allclose(found.decision_function(images), detector.decision_function(images))
    is_id = np.arange(40) < 20
    assert roc_auc_score(is_id, found.decision_function(images)) > 0.9
    assert is_outlier_detector(found)
    assert get_scorer("roc_auc")(found, images, is_id) > 0.9
    check_is_fitted(found)
    with pytest.raises(NotFittedError):
        check_is_fitted(copy)
    assert found.set_params(cap=1) is found
    assert (found.settings.cap, found.is_fitted) == (1, False)
    with pytest.raises(ConfigError, match="did you mean 'cap'"):
        found.set_params(caps=1)
    assert found.settings.cap == 1
    assert found.preprocessing == detector.preprocessing
    assert found.set_params(preprocessing=None).preprocessing is None


def test_images_of_another_size_are_told(detector):
    with pytest.warns(UserWarning, match=r"\[3, 20, 20\].*\[3, 16, 16\]"):
        detector.score(some_images(2, (20, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score(some_images(2, SIZE))


def test_a_pretrained_network_in_one_line(tmp_path, monkeypatch):
    """With random weights in the cache, where torchvision looks before it downloads."""
    from torchvision.models import ResNet18_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = resnet18()
    file = tmp_path / "hub/checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    found = FuseNorm.from_pretrained("torchvision:resnet18", cap=4)
    assert torch.equal(found.net.fc.weight, net.fc.weight)
    assert (found.settings.cap, found.net.training) == (4, False)
    array = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    wanted = ResNet18_Weights.DEFAULT.transforms()(picture)
    torch.testing.assert_close(found.preprocessing(picture), wanted)
    for name in ("torchvision:resnet81", "package.module:factory"):
        with pytest.raises(ConfigError, match=r"resnet18|timm"):
            FuseNorm.from_pretrained(name)


def test_lists_must_have_images_of_one_size(detector):
    for images in ([], [torch.zeros(3, 16, 16), torch.zeros(3, 20, 20)]):
        with pytest.raises(DataError, match="one size"):
            detector.score(images)
