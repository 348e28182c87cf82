"""Train a network, and resume after an interruption."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn
from torch.optim import SGD
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from fusenorm_openood.data.benchmarks import Benchmark, image_loader, load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.preprocessing import train_transform
from fusenorm_openood.errors import CheckpointError, ConfigError, DamagedFileError
from fusenorm_openood.kernels.devices import on_cpu
from fusenorm_openood.network.checkpoints import load_backbone
from fusenorm_openood.network.states import read_saved
from fusenorm_openood.storage.configs import read_config
from fusenorm_openood.storage.files import write_whole
from fusenorm_openood.storage.torchrun import Process
from fusenorm_openood.training.epoch import data_parallel, train_epoch, validation_accuracy, wait
from fusenorm_openood.training.recipes import Recipe, find_recipe


class Progress(NamedTuple):
    """The progress of a training run after an epoch."""

    epochs: int
    best_accuracy: float


def train(
    recipe: Recipe,
    benchmark: Benchmark,
    folder: str | Path,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    channels_last: bool = False,
    progress: bool = True,
    process: Process | None = None,
) -> Path:
    """Train a network on a benchmark's ID images, or resume an interrupted run.

    Everything that the next epoch needs is saved after each one, so that a resumed run ends with
    the same weights: on a CPU they are bitwise the same with the same number of processes and
    workers. Several processes share the work, each with its own batches; the first one writes.

    Args:
        recipe: what to train, and how.
        benchmark: a benchmark whose images all exist; see `Benchmark.missing`.
        folder: folder of the run; `best.ckpt` is from the epoch with the best validation accuracy,
            the last one if several are equal.
        device: device to train on.
        num_workers: number of processes that load images.
        channels_last: whether images and weights use the channels-last memory format.
        progress: whether to show a progress bar.
        process: this process among several, see `processes`; None = a single process.

    Returns:
        The path of `best.ckpt`; a finished run is not trained again.

    Raises:
        DataError: labels outside the network's classes.
        NonFiniteError: the loss became NaN or infinite; the last good checkpoint is kept.
        CheckpointError: the folder holds a run of another recipe, or `init` does not fit.
        ConfigError: `channels_last` on a CPU with a network that is too narrow for it, or a batch
            that the processes cannot share evenly.
    """
    folder, device, process = Path(folder), torch.device(device), process or Process()
    best, unfinished = folder / "best.ckpt", folder / "unfinished.ckpt"
    _check_recipe(folder / "recipe.yml", recipe)
    if best.is_file() and not unfinished.is_file():
        return best
    if channels_last and device.type == "cpu" and recipe.width < 8:
        # https://github.com/uxlfoundation/oneDNN/issues/6035
        raise ConfigError(
            "width must be >= 8 for channels_last on a CPU, below which oneDNN computes wrong "
            f"gradients, got {recipe.width}: train without channels_last"
        )
    batch_size = recipe.batch_per_process(process.world)
    benchmark.check_labels([benchmark.id["train"], benchmark.id["val"]])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    devices = [device] if device.type == "cuda" else []
    # Two threads for digits, so that the weights do not depend on the number of cores.
    limited = threads(2) if benchmark.name == "digits" else nullcontext()
    with limited, torch.random.fork_rng(devices):
        torch.manual_seed(recipe.seed)
        with on_cpu():
            net = recipe.build(benchmark.num_classes).float()
        if recipe.init is not None:
            load_backbone(net, recipe.init)
        net.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        optimiser = make_optimiser(recipe, net)
        done = resume(unfinished, net, optimiser)
        if process.leads and not unfinished.is_file():
            settings = yaml.safe_dump(recipe.as_dict(), sort_keys=False)
            write_whole(folder / "recipe.yml", lambda file: file.write_text(settings))
            # From here on, best.ckpt without unfinished.ckpt means that the run is finished.
            keep(unfinished, net, optimiser, done)
        if process.leads and done.epochs and not best.is_file():  # deleted by the user
            _save(best, net)
            done = done._replace(best_accuracy=-1.0)
        loader = make_loader(benchmark, batch_size, recipe.seed, process, num_workers, device)
        val_loader = image_loader(benchmark.id["val"], num_workers=num_workers)
        model = data_parallel(net, process, device)
        with tqdm(
            total=recipe.epochs * len(loader),
            initial=done.epochs * len(loader),
            desc="train",
            unit="step",
            disable=not (progress and process.leads),
        ) as bar:
            for epoch in range(done.epochs, recipe.epochs):
                # Every epoch has its own random state, so only its number has to be saved.
                torch.manual_seed((recipe.seed * 10_000 + epoch) * 1_000 + process.rank)
                if isinstance(loader.sampler, DistributedSampler):
                    loader.sampler.set_epoch(epoch)
                loss = train_epoch(model, optimiser, loader, recipe, epoch, memory_format, bar)
                if process.leads:
                    reached = validation_accuracy(net, val_loader)
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", val=f"{100 * reached:.2f}")
                    if reached >= done.best_accuracy:
                        _save(best, net)
                    log(folder / "log.csv", epoch, loss, reached)
                    done = Progress(epoch + 1, max(reached, done.best_accuracy))
                    keep(unfinished, net, optimiser, done)
                wait(process)
        if process.leads:
            unfinished.unlink()
    return best


def _check_recipe(path: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if a folder holds a run of another recipe, finished or not."""
    if not path.is_file():  # no run, or one that was trained elsewhere
        return
    begun = read_config(path)
    for name, value in recipe.as_dict().items():
        if begun.get(name) != value:
            raise CheckpointError(
                f"{name} must be {begun.get(name)}, as in the run in {path.parent}, got {value}: "
                "use the same recipe or another folder"
            )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch to `count` threads, and restore the previous number afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(count, before))
        yield
    finally:
        torch.set_num_threads(before)


def make_optimiser(recipe: Recipe, net: nn.Module) -> SGD:
    """SGD with Nesterov momentum and weight decay, as in OpenOOD."""
    decay = recipe.weight_decay
    return SGD(net.parameters(), recipe.lr, recipe.momentum, weight_decay=decay, nesterov=True)


def make_loader(
    benchmark: Benchmark,
    batch_size: int,
    seed: int,
    process: Process,
    num_workers: int,
    device: torch.device,
) -> CpuLoader:
    """Augmented training images in random order, in this process's batches of `batch_size`."""
    images = benchmark.id["train"].images()
    images.transform = train_transform(
        benchmark.pre_size,
        benchmark.image_size,
        benchmark.norm,
        flip=benchmark.name != "digits",
        zoom=benchmark.name.startswith("imagenet"),
    )
    sampler = None
    if process.world > 1:
        sampler = DistributedSampler[Any](images, process.world, process.rank, seed=seed)
    return CpuLoader(
        images,
        batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )


def _save(path: Path, net: nn.Module) -> None:
    """Save a network's weights on the CPU."""
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    write_whole(path, partial(torch.save, state))


def keep(path: Path, net: nn.Module, optimiser: SGD, done: Progress) -> None:
    """Save everything that the next epoch needs."""
    states = {"net": net.state_dict(), "optimiser": optimiser.state_dict()}
    write_whole(path, partial(torch.save, {**states, "progress": tuple(done)}))


def resume(path: Path, net: nn.Module, optimiser: SGD) -> Progress:
    """Restore network and optimiser from an interrupted run, if there is one.

    Raises:
        DamagedFileError: the file is damaged.
        CheckpointError: the file cannot be opened, or holds no run of this network. Other errors,
            such as running out of memory, are passed on, since the file is intact.
    """
    if not path.is_file():
        return Progress(0, -1.0)
    try:
        content = read_saved(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}, or remove it to start the run again") from None
    keys = {"net", "optimiser", "progress"}
    if not isinstance(content, dict) or set(content) != keys or not _fits(content["net"], net):
        raise CheckpointError(
            f"{path} holds no interrupted run of a {type(net).__name__}: remove it to start again"
        )
    net.load_state_dict(content["net"])
    optimiser.load_state_dict(content["optimiser"])
    return Progress(*content["progress"])


def _fits(state: Any, net: nn.Module) -> bool:
    """Whether a state dict has the names and shapes of the network's."""
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    return isinstance(state, dict) and shapes == {
        name: getattr(value, "shape", None) for name, value in state.items()
    }


def log(path: Path, epoch: int, loss: float, reached: float) -> None:
    """Append an epoch to the run's log, in place of a row whose epoch was not completed."""
    lines = path.read_text(encoding="utf-8").splitlines() if epoch and path.is_file() else []
    lines = lines[: epoch + 1] or ["epoch,loss,val_acc"]
    lines.append(f"{epoch + 1},{loss:.4f},{100 * reached:.2f}")
    write_whole(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def train_digits(
    data_root: str | Path,
    root: str | Path,
    seed: int = 0,
    method: str = "base",
    progress: bool = True,
) -> Path:
    """Write the digits benchmark and train a network on it, unless they already exist.

    The run is saved in `root/s<seed>`, where `root` is the folder of the training runs; returns
    the path of the checkpoint.
    """
    recipe = find_recipe("digits", seed=seed, method=method)
    write_digits(data_root)
    benchmark = load_benchmark("digits", data_root)
    return train(recipe, benchmark, Path(root) / f"s{seed}", progress=progress)
