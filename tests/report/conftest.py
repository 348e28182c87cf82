"""A report of each kind, about the digits."""

import shutil
from pathlib import Path

import pytest

from fusenorm_openood.cli.main import main
from fusenorm_openood.data.lists import read_imagelist
from tests.conftest import shortened_digits


@pytest.fixture(scope="session")
def folders(digits, tmp_path_factory) -> Path:
    """Folders of images, one file with a hostile name among them, and a calibrated detector."""
    data_root, checkpoint = digits
    home = tmp_path_factory.mktemp("report")
    for split in ("val_digits", "test_digits", "test_noise"):
        (home / split).mkdir()
        for name, *_ in read_imagelist(data_root / "benchmark_imglist" / "digits" / f"{split}.txt"):
            source = data_root / "images_digits" / name
            shutil.copy(source, home / split / source.name)
    noise = sorted((home / "test_noise").iterdir())
    for path in noise[60:]:
        path.unlink()
    noise[0].rename(home / "test_noise" / "<script>alert('&')<.png")
    (home / "test_noise" / "broken<b>.png").write_text("no image")
    names = home / "names.txt"
    names.write_text("".join(f"<script>class_{number}<\n" for number in range(7)))
    arguments = ["fit", "--weights", checkpoint, "--id-dir", home / "val_digits"]
    arguments += ["--calibration-dir", home / "test_digits", "--class-names", names]
    arguments += ["--image-size", 24, "--normalization", "digits", "--num-workers", 0]
    arguments += ["--no-progress", "--output", home / "detector.safetensors"]
    assert main([str(argument) for argument in arguments]) == 0
    return home


@pytest.fixture(scope="session")
def judged(folders) -> Path:
    """The CSV of `fusenorm score` on noise and on digits."""
    out = folders / "judged.csv"
    arguments = ["score", "--detector", folders / "detector.safetensors", "--csv", out]
    arguments += [folders / "test_noise", folders / "test_digits", "--num-workers", 0]
    assert main([*map(str, arguments), "--no-progress"]) == 3
    return out


@pytest.fixture(scope="session")
def score_page(folders, judged) -> Path:
    page = folders / "score.html"
    detector = folders / "detector.safetensors"
    arguments = ["report", "--detector", detector, "--csv", judged, "--output", page]
    assert main([str(argument) for argument in arguments]) == 0
    return page


@pytest.fixture(scope="session")
def short_data(digits, tmp_path_factory) -> Path:
    """The digits benchmark with short lists."""
    return shortened_digits(digits[0], tmp_path_factory.mktemp("short") / "data", 64, 60)


@pytest.fixture(scope="session")
def eval_page(digits, short_data) -> Path:
    return made("eval", digits[1], short_data, "--engine", "native")


@pytest.fixture(scope="session")
def compare_page(digits, short_data) -> Path:
    return made("compare", digits[1], short_data)


def made(command: str, checkpoint: Path, data_root: Path, *more: str) -> Path:
    """The page of `--report`."""
    page = data_root / f"{command}.html"
    arguments = [command, "--id-data", "digits", "--data-root", data_root, "--root", checkpoint]
    arguments += ["--num-workers", 0, "--no-progress", "--report", page, *more]
    assert main([str(argument) for argument in arguments]) == 0
    return page
