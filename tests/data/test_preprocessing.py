"""From files and PIL images to tensors: as OpenOOD's preprocessing, upright, and every error."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fusenorm_openood.data.paths import image_paths
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.data.transforms import NORMALIZATIONS, eval_transform
from fusenorm_openood.errors import ConfigError, DataError

NORM = NORMALIZATIONS["cifar10"]
PREPROCESSING = Preprocessing(36, (32, 32), "bilinear", *NORM)


def photograph(width: int = 50, height: int = 40) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def test_the_same_pixels_as_openoods_preprocessing():
    image = photograph()
    assert torch.equal(PREPROCESSING(image), eval_transform(36, 32, NORM)(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode):
    assert PREPROCESSING(photograph().convert(mode)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("suffix", "deep"), [("png", False), ("png", True), ("tif", False), ("webp", False)]
)
def test_images_are_turned_upright_by_their_exif_orientation(tmp_path, suffix, deep):
    image, path = photograph(), tmp_path / f"turned.{suffix}"
    if deep:
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    lossless = {"lossless": True} if suffix == "webp" else {}
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, **lossless)
    assert torch.equal(PREPROCESSING.read(path), PREPROCESSING(image))
    with Image.open(path) as file:
        before = np.asarray(file), dict(file.getexif())
        assert torch.equal(PREPROCESSING(file), PREPROCESSING(image))
        np.testing.assert_array_equal(np.asarray(file), before[0])
        assert dict(file.getexif()) == before[1]


def test_json_and_back():
    assert Preprocessing.from_json(PREPROCESSING.to_json()) == PREPROCESSING


def test_what_timm_declares():
    net = nn.Identity()
    assert Preprocessing.of(net) is None
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    net.pretrained_cfg = {
        "input_size": (3, 240, 240),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
    }
    assert Preprocessing.of(net) == Preprocessing(266, (240, 240), "bicubic", mean, std)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resize": 0}, "sizes must be >= 1"),
        ({"crop": (8, 0)}, "sizes must be >= 1"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'"),
        ({"std": (1.0, 0.0, 1.0)}, "each std > 0"),
        ({"mean": (1.0,)}, "must be 3 numbers"),
    ],
)
def test_values_that_cannot_be(changed, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**{**PREPROCESSING.to_json(), **changed})


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (("text.png", "cannot identify"), ("absent.png", "missing")):
        with pytest.raises(DataError, match=f"{name} cannot be read .*{reason}"):
            PREPROCESSING.read(tmp_path / name)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "inner/c d.webp", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_folders_patterns_lists_and_files_name_images(folder, monkeypatch):
    found = [folder / "a.JPG", folder / "b.png", folder / "inner" / "c d.webp"]
    assert list(image_paths([str(folder)])) == found
    assert list(image_paths([str(folder / "*.png"), str(folder)])) == [found[1], found[0], found[2]]
    assert list(image_paths([str(folder / "**" / "*.webp")])) == [found[2]]
    listed = folder / "list.txt"
    listed.write_text("\ufeffb.png 3\n\ninner/c d.webp\na.JPG\t-1\n", encoding="utf-8")
    assert list(image_paths([str(listed)])) == [found[1], found[2], found[0]]
    monkeypatch.setattr("sys.stdin", [f"{found[0]}\n", "\n"])
    assert list(image_paths(["-"])) == [found[0]]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("absent", "no file, folder"), ("*.tif", "matches no file"), ("inner2", "has no image files")],
)
def test_arguments_that_name_nothing(folder, argument, message):
    (folder / "inner2").mkdir()
    with pytest.raises(DataError, match=message):
        image_paths([str(Path(folder / argument))])


def test_a_list_in_another_encoding(folder):
    (folder / "list.txt").write_bytes("é.png".encode("latin-1"))
    with pytest.raises(DataError, match="must be in UTF-8"):
        image_paths([str(folder / "list.txt")])
