"""Programs that resize and crop images of one size themselves."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusenorm_openood.cli.main import main
from fusenorm_openood.data.preprocessing import INTERPOLATIONS, Preprocessing
from fusenorm_openood.errors import ConfigError, ExportError
from fusenorm_openood.export.judge import Inputs
from fusenorm_openood.export.resize import Resize
from tests.export.files import noise_images
from tests.export.programs import assert_agrees, fitted, loaded, needs_export
from tests.nets import Net

SIZES = [  # of the image, before and after the crop
    ((48, 64), 26, (22, 24)),
    ((64, 48), (24, 30), (24, 24)),  # Pillow 13 begins with the height
    ((20, 31), 36, (32, 36)),
    ((32, 32), 32, (32, 32)),
    ((333, 250), 8, (8, 8)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_pixels_are_those_of_pillow(interpolation, size, tmp_path):
    (height, width), before, crop = size
    mode = "center" if isinstance(before, int) else "squash"
    how = Preprocessing(before, crop, interpolation, (0.0,) * 3, (1.0,) * 3, mode)
    images = noise_images(3, height, width)
    found = Resize.of(how, height, width)(torch.from_numpy(images).permute(0, 3, 1, 2))
    for image, pixels in zip(images, found, strict=True):
        Image.fromarray(image).save(tmp_path / "it.png")
        np.testing.assert_array_equal(pixels, how.pixels(tmp_path / "it.png"))


def test_what_a_program_cannot_resize(monkeypatch):
    how = Preprocessing(26, (24, 24), "bilinear", (0.5,), (0.5,), dtype="uint16")
    with pytest.raises(ConfigError, match="resizes uint8 images only, got uint16: leave out"):
        Resize.of(how, 40, 40)
    how = Preprocessing(26, (24, 30), "bilinear", (0.5,), (0.5,))
    with pytest.raises(ConfigError, match=r"crop \(24, 30\) is larger than .* \(26, 26\): leave"):
        Resize.of(how, 40, 40)
    with pytest.raises(ConfigError, match=r"images of 4 x 3000 are too large to be resized in a"):
        Resize.of(Preprocessing((4, 4), (4, 4), "lanczos", (0.5,), (0.5,), "squash"), 4, 3000)
    with pytest.raises(ConfigError, match="resize_from needs a preprocessing, and this detector"):
        Inputs.of(None, None, (3, 8, 8), (9, 9))
    for size in (48, (48,), (48, 64, 3), (0, 5), (48.5, 64)):
        with pytest.raises(ConfigError, match="must be a "):
            Inputs.of(Preprocessing(26, (24, 24), "bilinear", (0.5,), (0.5,)), None, None, size)
    with pytest.raises(ConfigError, match="images of 1 x 640 have no pixels left"):
        Resize.of(Preprocessing(8, (8, 8), "bilinear", (0.5,), (0.5,), "border"), 1, 640)
    monkeypatch.setattr(Preprocessing, "cropped", lambda *given: np.zeros((24, 24)))
    with pytest.raises(ExportError, match=r"Pillow .* resizes images of 40 x 41 in a way that a"):
        Resize.of(Preprocessing(26, (24, 24), "bilinear", (0.5,), (0.5,)), 40, 41)


@needs_export
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_files_of_one_size_have_the_verdicts_of_the_detector(suffix, tmp_path, capsys):
    detector, path = fitted(Net()), tmp_path / f"it{suffix}"
    if suffix == ".onnx":
        detector.export(path, resize_from=(40, 50))
    else:
        detector.save(tmp_path / "it.safetensors")
        given = ["--detector", str(tmp_path / "it.safetensors"), "--network", "tests.nets:Net"]
        size = ["--resize-from", "40", "50"]
        assert main(["export", *given, "--output", str(path), *size, "--target", "pt2"]) == 0
    (tmp_path / "images").mkdir()
    images = noise_images(40, 40, 50)
    for number, image in enumerate(images):
        Image.fromarray(image // (1 + number % 3)).save(tmp_path / "images" / f"{number:02}.png")
    paths = sorted((tmp_path / "images").iterdir())
    pixels = torch.stack([detector.known_preprocessing().pixels(path) for path in paths])
    whole = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    assert_agrees(detector, lambda _: loaded(path)(torch.from_numpy(whole)), pixels)
    if suffix == ".onnx":
        command = ["recalibrate", "--program", str(path)]
        assert main([*command, "--calibration-dir", str(tmp_path / "images")]) == 0
        run = loaded(path)
        ranks = [run(torch.from_numpy(image[None]))["rank"][0] for image in whole]
        assert sorted(ranks) == list(range(2, 42))
        Image.fromarray(images[0][:, :40]).save(tmp_path / "images" / "other.png")
        assert main([*command, "--calibration-dir", str(tmp_path / "images")]) == 1
        assert "other.png is 40 x 40, and" in capsys.readouterr().err
