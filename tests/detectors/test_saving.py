"""Detector files: the round trip to the bit, other networks, and every kind of damage."""

import json
import random

import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import ConfigError, DetectorFileError, NotFittedError
from tests.conftest import assert_undisturbed, make_loader, make_net, state_of
from tests.nets import Net, some_images

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(9))
SETTINGS = {
    "default": Settings(),
    "deviation": Settings.deviation(),
    "published": Settings.published(input_std=(0.2, 0.3, 0.25)),
    "posthoc": Settings(strong=("knn", "vim", "she", "nci"), neighbours=3),
    "named": Settings(taps=("layer2", "layer4.0"), strong=("layer4.0", "gen")),
}


@pytest.fixture
def saved(net, loader, tmp_path):
    detector = FuseNorm(net).fit(loader, calibration=make_loader(40, seed=7))
    detector.save(tmp_path / "detector.safetensors")
    return detector, tmp_path / "detector.safetensors"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_loaded_detector_gives_the_same_bits(net, loader, tmp_path, settings):
    detector = FuseNorm(net, settings).fit(loader, calibration=make_loader(40, seed=7))
    path = tmp_path / "kept" / "detector.safetensors"
    before = state_of(net)
    detector.save(path)
    loaded = FuseNorm.load(path, net)
    assert_undisturbed(net, before)
    assert (loaded.settings, loaded.experts, loaded.strong) == (
        detector.settings,
        detector.experts,
        detector.strong,
    )
    assert torch.equal(loaded.score(IMAGES), detector.score(IMAGES))
    assert torch.equal(loaded.p_values(IMAGES), detector.p_values(IMAGES))
    assert torch.equal(loaded.is_ood(IMAGES, 0.8), detector.is_ood(IMAGES, 0.8))
    assert loaded.guarantee(0.9) == detector.guarantee(0.9)


def test_before_fit_there_is_nothing_to_save_and_calibration_images_may_lack(net, loader, tmp_path):
    with pytest.raises(NotFittedError):
        FuseNorm(net).save(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    FuseNorm(net).fit(loader).save(tmp_path / "d")
    assert FuseNorm.load(tmp_path / "d", net).calibration_scores_ is None


def test_another_network_is_an_error_that_says_what_differs(saved):
    _, path = saved
    with pytest.raises(
        DetectorFileError,
        match=r"differs \(fc.weight is float32 \[5, 32\] instead of float32 \[4, 32\], fc.bias",
    ):
        FuseNorm.load(path, make_net(classes=5))


def test_other_weights_are_an_error_or_a_warning(saved, net):
    detector, path = saved
    with torch.no_grad():
        net.layer2[0].conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(DetectorFileError, match="other weights of the same network"):
        FuseNorm.load(path, net)
    with pytest.warns(UserWarning, match="other weights"):
        loaded = FuseNorm.load(path, net, strict=False)
    assert torch.equal(loaded.score(IMAGES), detector.score(IMAGES))  # both with these weights


def test_damaged_files_are_all_refused(saved, net, tmp_path):
    _, path = saved
    data, draw = path.read_bytes(), random.Random(0)
    for number in range(200):
        changed = bytearray(data)
        kind = number % 4
        if kind == 0:  # flipped bits, half of them in the header
            place = draw.randrange(len(data) if number % 8 else 3000)
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed = changed[: draw.randrange(len(data))]
        elif kind == 2:
            changed += draw.randbytes(draw.randrange(1, 100))
        else:
            start = draw.randrange(len(data) - 8)
            changed[start : start + 8] = draw.randbytes(8)
        if bytes(changed) == data:
            continue
        damaged = tmp_path / "damaged"
        damaged.write_bytes(changed)
        with pytest.raises(DetectorFileError, match=r"damaged|no detector file"):
            FuseNorm.load(damaged, net)


@pytest.mark.parametrize("version", [1, 2, 3, 5])
def test_another_format_is_refused(saved, net, tmp_path, monkeypatch, version):
    detector, _ = saved
    monkeypatch.setattr("fusenorm_openood.storage.detector_file.FORMAT", version)
    detector.save(tmp_path / "other")
    monkeypatch.undo()
    found = rf"has format {version}, this version of the package reads 4: .* or fit again"
    with pytest.raises(DetectorFileError, match=found):
        FuseNorm.load(tmp_path / "other", net)


def test_other_files_and_no_file(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "checkpoint.pt")
    (tmp_path / "text").write_text(json.dumps({"checksum": "0" * 64}))
    for name in ("checkpoint.pt", "text"):
        with pytest.raises(DetectorFileError, match="no detector file"):
            FuseNorm.load(tmp_path / name, net)
    with pytest.raises(DetectorFileError, match="cannot be read"):
        FuseNorm.load(tmp_path / "nothing", net)


def test_a_folder_that_cannot_be_written(saved, tmp_path):
    detector, _ = saved
    (tmp_path / "file").touch()
    with pytest.raises(DetectorFileError, match="cannot be written"):
        detector.save(tmp_path / "file" / "detector")


class WideFeature(Net):
    """Two blocks, and as many features and classes as a real network has."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.fc = nn.Linear(8, 512), nn.Linear(512, 10)
        self.eval()

    def feature(self, x):
        return self.widen(super().feature(x)).relu()


def test_a_preprocessing_of_other_channels_is_not_saved(tmp_path):
    detector = FuseNorm(Net()).fit([some_images(24)])
    detector.preprocessing = Preprocessing(12, (12, 12), "bilinear", (0.5,), (0.5,))
    with pytest.raises(ConfigError, match="has 1 channels, the images of its fit 3: set"):
        detector.save(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_matrices_as_large_as_a_real_network_s_give_the_same_bits(tmp_path):
    """Whose products round in another way if a matrix is kept in another order."""
    torch.manual_seed(0)
    net, strong = WideFeature(), ("output", "fdbd", "mds++", "vim", "knn", "she", "nci")
    detector = FuseNorm(net, strong=strong).fit([some_images(40)])
    detector.save(tmp_path / "detector.safetensors")
    loaded = FuseNorm.load(tmp_path / "detector.safetensors", net)
    for batch in (1, 3):
        images = some_images(batch, seed=3)
        assert torch.equal(loaded.score(images), detector.score(images))
