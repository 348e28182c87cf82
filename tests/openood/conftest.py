"""These tests need OpenOOD itself: install it with bash scripts/install_openood.sh."""

from pathlib import Path

import pytest

from fusenorm_openood import load_network
from fusenorm_openood.openood.bridge import openood_installed

RUNS = {
    "base": "cifar10_resnet18_32x32_base_e8_lr0.15_default",
    "t2fnorm": "cifar10_t2fnorm_net_t2fnorm_e2_lr0.02_alpha0.1_default",
}


def pytest_collection_modifyitems(items):
    if openood_installed():
        return
    for item in items:
        if "tests/openood" in item.path.as_posix():
            reason = "OpenOOD is not installed: bash scripts/install_openood.sh"
            item.add_marker(pytest.mark.skip(reason=reason))


def first_images(data_root: Path, few: Path, count: int) -> Path:
    """A data root with the first images of every list."""
    lists = few / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    (few / "images_classic").symlink_to(data_root / "images_classic")
    for path in (data_root / "benchmark_imglist" / "cifar10").glob("*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        (lists / path.name).write_text("".join(lines[:count]))
    return few


@pytest.fixture(scope="session")
def home(bench, tmp_path_factory):
    """A folder whose ./data holds the first 8 images of every list."""
    home = tmp_path_factory.mktemp("home")
    first_images(bench[0], home / "data", 8)
    return home


@pytest.fixture(scope="session")
def checkpoints(bench):
    """The checkpoints trained with cross-entropy and with T2FNorm."""
    return {name: bench[1] / run / "s0" / "best.ckpt" for name, run in RUNS.items()}


@pytest.fixture(scope="session")
def networks(checkpoints):
    return {name: load_network(path, 10) for name, path in checkpoints.items()}
