"""The digits benchmark with few images, so that a command takes a second."""

from pathlib import Path
from typing import NamedTuple

import pytest

from fusenorm_openood.cli.main import main
from tests.conftest import shortened_digits


class Short(NamedTuple):
    """A data root and a checkpoint."""

    data: Path
    checkpoint: Path

    def argv(self, command: str, store: object, *more: object) -> list[object]:
        """The arguments of a command that evaluates the network."""
        root = ["--root", self.checkpoint, "--id-data", "digits", "--data-root", self.data]
        quick = ["--num-workers", 0, "--no-progress", "--device", "cpu"]
        return [command, *root, "--store", store, *quick, *more]


@pytest.fixture(scope="session")
def short(digits, tmp_path_factory) -> Short:
    """The first images of every list: 70 for training, one from digit 9, and else 30."""
    data = shortened_digits(digits[0], tmp_path_factory.mktemp("short") / "data", 70, 30)
    one = data / "benchmark_imglist" / "digits" / "test_digit9.txt"
    one.write_text(one.read_text().splitlines(keepends=True)[0])
    return Short(data, digits[1])


@pytest.fixture(scope="session")
def detector(short, tmp_path_factory) -> Path:
    """A detector in a file, with calibration images."""
    images, path = short.data / "images_digits", tmp_path_factory.mktemp("detector") / "d.st"
    argv = ["fit", "--weights", short.checkpoint, "--id-dir", images / "val_digits"]
    argv += ["--output", path, "--calibration-dir", images / "test_digits", "--image-size", 24]
    argv += ["--normalization", "digits", "--no-progress", "--num-workers", 0, "--device", "cpu"]
    assert main([str(a) for a in argv]) == 0
    return path
