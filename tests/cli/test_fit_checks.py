"""What `fusenorm fit` refuses before it fits, and calibration images that repeat each other."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main
from fusenorm_openood.network import ResNet18_32x32


def small(num_classes=5):
    torch.manual_seed(0)
    return ResNet18_32x32(5, width=4).eval()


@pytest.fixture
def fit(tmp_path):
    """Runs the command on folders of noise, `id` with 40 images and `other` with 30."""
    rng = np.random.default_rng(0)
    for name, count in (("id", 40), ("other", 30)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number:03}.png")

    def run(*more, calibration=("other",)):
        argv = ["fit", "--network", f"{__name__}:small", "--image-size", "16"]
        argv += ["--normalization", "imagenet", "--id-dir", tmp_path / "id"]
        argv += ["--calibration-dir", *(tmp_path / name for name in calibration)]
        argv += ["--output", tmp_path / "d.safetensors", "--num-workers", "0", "--no-progress"]
        return main([str(a) for a in (*argv, "--device", "cpu", *more)])

    return run


def said_before_the_fit(capsys):
    said = capsys.readouterr()
    assert said.out == ""  # which begins with "fitted on"
    return said.err


def test_too_few_calibration_images_are_refused_before_the_fit(fit, tmp_path, capsys):
    for path in sorted((tmp_path / "other").iterdir())[:12]:
        path.unlink()
    assert fit() == 1
    wanted = "acceptance=0.95 needs at least 19 calibration images, got 18"
    assert wanted in said_before_the_fit(capsys)


@pytest.mark.parametrize("how", ["one file", "link", "inside"])
def test_an_overlap_is_refused_before_the_fit(fit, tmp_path, capsys, how):
    calibration = ["other"]
    if how == "one file":
        calibration += ["id/007.png"]
    elif how == "link":
        (tmp_path / "other" / "linked.png").symlink_to(tmp_path / "id" / "007.png")
    else:
        (tmp_path / "other").rename(tmp_path / "id" / "other")
        calibration = ["id/other"]
    assert fit(calibration=calibration) == 1
    err = said_before_the_fit(capsys)
    assert "calibration images are among those that the detector is fitted on, for example" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("output", ["", "folder"])
def test_an_output_that_is_no_file_is_refused_before_the_fit(fit, tmp_path, capsys, output):
    given = tmp_path / output if output else output
    (tmp_path / output).mkdir(exist_ok=True)
    assert fit("--output", given) == 1
    assert f"--output must be a file, got '{given or '.'}'" in said_before_the_fit(capsys)


def test_copies_count_once_and_the_fit_is_kept(fit, tmp_path, capsys):
    for number, path in enumerate(sorted((tmp_path / "other").iterdir())):
        if number < 10:
            for copy in range(3):
                shutil.copy(path, path.with_name(f"{path.stem}-{copy}.png"))
        else:
            path.unlink()
    with pytest.warns(UserWarning, match="30 of 40 calibration images"):
        assert fit() == 0
    assert "needs at least 19 calibration images" in capsys.readouterr().out
    loaded = FuseNorm.load(tmp_path / "d.safetensors", small())
    assert len(loaded.calibration_scores_) == 10
