"""These tests need the real OpenOOD: bash scripts/install_openood.sh installs it."""

import pytest

from fusenorm_openood.openood_bridge import openood_installed


def pytest_collection_modifyitems(items):
    if openood_installed():
        return
    for item in items:
        if "tests/openood" in item.path.as_posix():
            reason = "OpenOOD is not installed: bash scripts/install_openood.sh"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def few_images(bench, tmp_path_factory):
    """The first 20 images of every list, and the results."""
    data_root, results = bench
    few = tmp_path_factory.mktemp("few")
    (few / "images_classic").symlink_to(data_root / "images_classic")
    lists = few / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    for path in (data_root / "benchmark_imglist" / "cifar10").glob("*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        (lists / path.name).write_text("".join(lines[:20]))
    return few, results
