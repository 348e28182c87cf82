"""A small network that is a training run, and few digits."""

from pathlib import Path

import pytest
import torch

from fusenorm_openood.cli.main import main
from tests.conftest import make_net, shortened_digits

IMAGES = 24  # in each list
DIGITS = 7  # classes


@pytest.fixture(scope="session")
def few(digits_images, tmp_path_factory) -> Path:
    """The digits benchmark with few images in every list; tests leave it unchanged."""
    return shortened_digits(digits_images, tmp_path_factory.mktemp("few") / "data", IMAGES, IMAGES)


@pytest.fixture
def runs(tmp_path) -> Path:
    """A root of one training run."""
    (tmp_path / "run" / "s0").mkdir(parents=True)
    torch.save(make_net(classes=DIGITS).state_dict(), tmp_path / "run" / "s0" / "best.ckpt")
    return tmp_path / "run"


@pytest.fixture
def evaluate(few, runs):
    """Runs `fusenorm eval` or another command on the root, and returns its exit status."""

    def run(*options, command="eval", data_root=few, root=runs) -> int:
        argv = [command, "--id-data", "digits", "--data-root", data_root, "--root", root]
        argv += ["--num-workers", 0, "--no-progress", "--device", "cpu", "--store", "none"]
        return main([str(argument) for argument in (*argv, *options)])

    return run
