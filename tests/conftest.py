"""Networks, images and benchmarks that many tests share."""

import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood import atf
from fusenorm_openood.data.benchmarks import Benchmark, load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.training.loop import train_digits

CLASSES = 4

# Where OpenOOD is installed, tests/openood runs, the postprocessor has OpenOOD's base class,
# commands choose among two engines, and numpy, pandas and scikit-learn are those OpenOOD needs.
OPENOOD = re.compile(
    r"tests/(openood/|without_openood/|cli/test_(doctor|eval)|docs/test_generated"
    r"|evaluation/test_leaderboard|method/test_(conformal|metrics|statistics)|test_numbers)"
)

# No example fails because the machine is busy, and all runs try the same ones.
settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)  # before the tests with a marker are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if OPENOOD.search(item.path.as_posix()):
            item.add_marker(pytest.mark.openood)


def make_net(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A small ResNet-18 with running statistics that make its features differ between images."""
    torch.manual_seed(seed)
    net = ResNet18_32x32(classes, width=4)
    with torch.no_grad():
        net(torch.randn(64, 3, 16, 16))
    return net.eval()


def make_t2fnorm(classes: int = CLASSES) -> T2FNormNet:
    """The same network trained with T2FNorm, at a temperature of 0.1."""
    net = T2FNormNet(make_net(classes=classes), classes).eval()
    net.set_tau(0.1)
    return net


def make_loader(n: int = 60, seed: int = 1, batch_size: int = 16, scale: float = 1.0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 16, 16, generator=generator) * scale
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size)


def state_of(net: nn.Module) -> tuple:
    """Everything about a network that a detector must leave unchanged."""
    return (
        {name: m.training for name, m in net.named_modules()},
        {name: p.requires_grad for name, p in net.named_parameters()},
        {name: p.grad is None for name, p in net.named_parameters()},
        {name: v.clone() for name, v in net.state_dict().items()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
    )


def assert_undisturbed(net: nn.Module, before: tuple) -> None:
    after = state_of(net)
    assert after[:3] == before[:3]
    assert after[4] == before[4]
    assert all(torch.equal(after[3][key], value) for key, value in before[3].items())


def shortened_digits(data_root: Path, home: Path, train: int, others: int) -> Path:
    """A data root with the first images of every list of the digits benchmark."""
    home.mkdir(exist_ok=True)
    (home / "images_digits").symlink_to(data_root / "images_digits")
    lists = home / "benchmark_imglist" / "digits"
    lists.mkdir(parents=True)
    for path in (data_root / "benchmark_imglist" / "digits").glob("*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        (lists / path.name).write_text("".join(lines[: train if "train" in path.name else others]))
    return home


def drawn_benchmark(name: str, data_root: Path, images: int = 2) -> Benchmark:
    """A benchmark whose lists hold so many drawn images of 40x60 pixels each, of class 0."""
    benchmark, rng = load_benchmark(name, data_root), np.random.default_rng(0)
    for image_set in benchmark.every():
        image_set.imagelist.parent.mkdir(parents=True, exist_ok=True)
        image_set.data_dir.mkdir(exist_ok=True)
        files = [f"{image_set.imagelist.stem}_{number}.png" for number in range(images)]
        for file in files:
            pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
            Image.fromarray(pixels).save(image_set.data_dir / file)
        label = 0 if image_set in (*benchmark.id.values(), *benchmark.csid.values()) else -1
        image_set.imagelist.write_text("".join(f"{file} {label}\n" for file in files))
    return benchmark


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Compute ATF with one backend; without a CUDA device, Triton's runs in its interpreter."""
    if name != "torch":
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSENORM_KERNEL", name)
        yield


def without_environment(**variables: str) -> dict[str, str]:
    """The variables of this process and others, none of which names a Python environment."""
    named = ("FUSENORM_VENV", "VIRTUAL_ENV", "CONDA_PREFIX")
    return {k: v for k, v in os.environ.items() if k not in named} | variables


@pytest.fixture
def memory() -> Any:
    """An empty file system in memory."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


@pytest.fixture
def net() -> nn.Module:
    return make_net()


@pytest.fixture
def loader() -> DataLoader:
    return make_loader()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same in every process of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _kernel_compiled_once(session_folder: Path) -> None:
    """One of pytest-xdist's processes compiles the CPU kernel; the others find it."""
    with FileLock(session_folder / "kernel.lock"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it fails, the tests of kernels say so
        atf(torch.ones(1, 1, 2, 2))


@pytest.fixture(scope="session")
def digits_images(session_folder: Path) -> Path:
    """Data root of the digits benchmark, written once per session."""
    data_root = session_folder / "digits" / "data"
    with FileLock(session_folder / "digits_images.lock"):
        write_digits(data_root)
    return data_root


@pytest.fixture(scope="session")
def digits(session_folder: Path, digits_images: Path) -> tuple[Path, Path]:
    """Data root and checkpoint of the digits benchmark, its network trained once per session."""
    with FileLock(session_folder / "digits.lock"):
        return digits_images, train_digits(
            digits_images, session_folder / "digits" / "run", progress=False
        )


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data root and results for real CIFAR-10 images, from the folder FUSENORM_BENCH_DATA."""
    place = os.environ.get("FUSENORM_BENCH_DATA")
    if not place:
        pytest.skip("needs real CIFAR-10 images: set FUSENORM_BENCH_DATA to their folder")
    home = tmp_path_factory.mktemp("bench")
    with tarfile.open(Path(place) / "cifar10_mini.tar.xz") as archive:
        archive.extractall(home, filter="data")
    return home / "data", Path(place) / "results"
