"""From files and PIL images to tensors: as OpenOOD's preprocessing, upright, and every error."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fusenorm_openood.cli.fit import preprocessing_of
from fusenorm_openood.data.images import UNREADABLE, TruncatedImageWarning
from fusenorm_openood.data.preprocessing import NORMALIZATIONS, EvalTransform, Preprocessing
from fusenorm_openood.errors import ConfigError, DataError

NORM = NORMALIZATIONS["cifar10"]
PREPROCESSING = Preprocessing(36, (32, 32), "bilinear", *NORM)


def photograph(width: int = 50, height: int = 40) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def test_the_same_pixels_as_openoods_preprocessing():
    image = photograph()
    assert torch.equal(PREPROCESSING(image), EvalTransform(NORM, (36, 32))(image))


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
    assert Preprocessing.of(net, 240) == Preprocessing.of(net)
    assert Preprocessing.of(net, 97) == Preprocessing(107, (97, 97), "bicubic", mean, std)


def declaring(mode="center", size=(3, 32, 32), share=0.9, interpolation="bicubic"):
    """A network that declares a preprocessing as those of timm do."""
    net = nn.Identity()
    net.pretrained_cfg = {"input_size": size, "crop_pct": share, "crop_mode": mode}
    net.pretrained_cfg |= {"interpolation": interpolation}
    net.pretrained_cfg |= {"mean": (0.1, 0.5, 0.9), "std": (0.5, 0.5, 0.5)}
    return net


def normalised(pixels: np.ndarray) -> torch.Tensor:
    scaled = torch.from_numpy(pixels.transpose(2, 0, 1) / 255.0)
    return ((scaled - torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)) / 0.5).float()


@pytest.mark.parametrize(("width", "height"), [(50, 20), (20, 50), (70, 71)])
@pytest.mark.parametrize(("size", "inner"), [((32, 32), (40, 40)), ((32, 24), (40, 30))])
def test_squash_resizes_both_sides_and_crops(width, height, size, inner):
    image = photograph(width, height)
    resized = np.asarray(image.resize(inner[::-1], Image.Resampling.BICUBIC))
    top, left = ((i - s) // 2 for i, s in zip(inner, size, strict=True))
    expected = normalised(resized[top : top + size[0], left : left + size[1]])
    found = Preprocessing.of(declaring("squash", (3, *size), 0.8))(image)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("width", "height", "inner"), [(64, 32, (32, 16)), (16, 48, (11, 32))])
def test_border_fits_the_image_in_and_pads_with_the_mean(width, height, inner):
    image = photograph(width, height)
    expected = np.full((32, 32, 3), [26, 128, 230], np.uint8)  # 255 * mean
    top, left = (32 - inner[1]) // 2, (32 - inner[0]) // 2
    resized = np.asarray(image.resize(inner, Image.Resampling.BICUBIC))
    expected[top : top + inner[1], left : left + inner[0]] = resized
    found = Preprocessing.of(declaring("border", share=1.0))(image)
    torch.testing.assert_close(found, normalised(expected))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 32, 32), (3, 40, 24)])
@pytest.mark.parametrize("share", [0.8, 1.0, 1.1])
def test_the_very_pixels_of_timm(interpolation, mode, size, share):
    data = pytest.importorskip("timm.data")
    net = declaring(mode, size, share, interpolation)
    config = data.resolve_data_config({}, pretrained_cfg=net.pretrained_cfg)
    for width, height in ((50, 20), (33, 101), (32, 32)):
        image = photograph(width, height)
        assert torch.equal(Preprocessing.of(net)(image), data.create_transform(**config)(image))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "resize", "crop"), [(None, 35, 32), (32, 35, 32), (64, 71, 64)])
def test_an_image_size_keeps_what_a_network_declares(mode, size, resize, crop):
    found = preprocessing_of(declaring(mode), size, bits=12)
    assert (found.resize, found.crop, found.crop_mode) == (resize, (crop, crop), mode)
    assert found.bits == 12


def test_files_of_earlier_versions_and_json_without_what_is_usual():
    earlier = {"resize": 36, "crop": (32, 32), "interpolation": "bilinear"}
    earlier |= {"mean": NORM[0], "std": NORM[1]}
    assert PREPROCESSING.to_json() == earlier
    assert Preprocessing.from_json(earlier) == PREPROCESSING
    for net in (declaring("squash", (3, 40, 24)), declaring("border")):
        other = replace(Preprocessing.of(net), bits=12)
        assert Preprocessing.from_json(json.loads(json.dumps(other.to_json()))) == other


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("kept", [0.9])
def test_a_truncated_upload_is_read_as_the_file(tmp_path, kind, kept):
    data = BytesIO()
    photograph().save(data, kind)
    cut = data.getvalue()[: int(kept * len(data.getvalue()))]
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(cut)
    with pytest.warns(TruncatedImageWarning):
        expected = PREPROCESSING.read(path)
    with pytest.warns(TruncatedImageWarning, match="the image is truncated"):
        assert torch.equal(PREPROCESSING(Image.open(BytesIO(cut))), expected)


@pytest.mark.parametrize("error", [*UNREADABLE, AttributeError, MemoryError])
def test_whatever_pil_raises_for_an_image_is_one_error(error):
    image = photograph()

    def fails(*_):
        raise error("no image data")

    image.convert = fails
    why = "pixels that PIL reads" if error is Image.DecompressionBombError else "no image data"
    with pytest.raises(DataError, match=rf"the image cannot be read \(.*{why}.*\): restore"):
        PREPROCESSING(image)


def test_thin_images_are_refused_where_resizing_would_take_much_memory():
    with pytest.raises(DataError, match=r"200000 x 1, .* 259200000 pixels .*: crop it"):
        PREPROCESSING(Image.new("RGB", (200_000, 1)))  # a PNG file of 700 bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resize": 0}, "resize must be one or two whole numbers >= 1, got 0"),
        ({"resize": (8,)}, "resize must be"),
        ({"crop": (8, 0)}, "crop must be two whole"),
        ({"crop": (8, 8, 8)}, "crop must be"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, .*, got 'cubic'"),
        ({"crop_mode": "pad"}, "crop_mode must be one of center, .*, got 'pad'"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be numbers > 0"),
        ({"mean": (1.0,)}, "std must be 1 numbers > 0, as many as means, got"),
        ({"mean": (127, 127, 127)}, r"in \[0, 1\], got \(127.* by 255"),
        ({"mean": (-1, 0, 0), "dtype": "uint16"}, r"in \[0, 1\].* by 65535"),
        ({"mean": ()}, "mean must be a number for each channel"),
        *(({"bits": b}, "bits must be a whole number from 8 to 16") for b in (7, 17, 12.0, "12")),
    ],
)
def test_values_that_cannot_be(changed, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**{**PREPROCESSING.to_json(), **changed})
