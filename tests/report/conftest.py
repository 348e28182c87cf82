"""A report of each kind, about the digits, made once per session."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from fusenorm_openood.cli.main import main
from tests.conftest import shortened_digits

QUICK = ["--num-workers", "0", "--no-progress"]


def once(home: Path, make: Callable[[], object]) -> Path:
    """A folder that one of pytest-xdist's processes has filled."""
    with FileLock(home.with_suffix(".lock")):
        if not (home / "made").exists():
            home.mkdir(exist_ok=True)
            make()
            (home / "made").touch()
    return home


def call(*arguments: object) -> int:
    return main([*map(str, arguments), *QUICK])


@pytest.fixture(scope="session")
def folders(digits, session_folder) -> Path:
    """Folders of images, one with a hostile name among them, a calibrated detector and its rows."""
    home, (data_root, checkpoint) = session_folder / "judged", digits

    def make():
        for split, count in (("val_digits", 100), ("test_digits", 100), ("test_noise", 40)):
            (home / split).mkdir()
            for path in sorted((data_root / "images_digits" / split).iterdir())[:count]:
                shutil.copy(path, home / split)
        noise = home / "test_noise"
        min(noise.iterdir()).rename(noise / "<script>alert('&')<.png")
        (noise / "broken<b>.png").write_text("no image")
        names, detector = home / "names.txt", home / "detector.safetensors"
        names.write_text("".join(f"<script>class_{number}<\n" for number in range(7)))
        fit = ["fit", "--weights", checkpoint, "--id-dir", home / "val_digits"]
        fit += ["--calibration-dir", home / "test_digits", "--class-names", names]
        fit += ["--image-size", 24, "--normalization", "digits", "--output", detector]
        assert call(*fit) == 0
        images = [home / "test_noise", home / "test_digits"]
        assert call("score", "--detector", detector, "--csv", home / "judged.csv", *images) == 3

    return once(home, make)


@pytest.fixture(scope="session")
def judged(folders) -> Path:
    """The CSV of `fusenorm score` on noise and on digits."""
    return folders / "judged.csv"


@pytest.fixture(scope="session")
def score_page(folders, judged) -> Path:
    page, detector = folders / "score.html", folders / "detector.safetensors"
    if not page.exists():
        arguments = ["report", "--detector", detector, "--csv", judged, "--output", page]
        assert main([str(argument) for argument in arguments]) == 0
    return page


@pytest.fixture(scope="session")
def short_data(digits_images, session_folder) -> Path:
    """The digits benchmark with short lists."""
    home = session_folder / "short_digits"
    return once(home, lambda: shortened_digits(digits_images, home, 64, 40))


@pytest.fixture(scope="session")
def eval_page(digits, short_data, session_folder) -> Path:
    return made("eval", digits[1], short_data, session_folder, "--engine", "native")


@pytest.fixture(scope="session")
def compare_page(digits, short_data, session_folder) -> Path:
    return made("compare", digits[1], short_data, session_folder)


def made(command: str, checkpoint: Path, data_root: Path, folder: Path, *more: str) -> Path:
    """The page of `--report`."""
    home = folder / f"{command}_report"
    arguments = [command, "--id-data", "digits", "--data-root", data_root, "--root", checkpoint]
    arguments += ["--report", home / f"{command}.html", *more]

    def make():
        assert call(*arguments) == 0

    return once(home, make) / f"{command}.html"
