"""Train a network in one process or several, and resume after an interruption."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import distributed, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from fusenorm_openood import errors
from fusenorm_openood.data import benchmarks, digits, preprocessing
from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.forward.batches import Labels, batches
from fusenorm_openood.kernels.devices import device_of, on_cpu
from fusenorm_openood.method.metrics import accuracy
from fusenorm_openood.network.checkpoints import load_backbone
from fusenorm_openood.network.states import read_saved
from fusenorm_openood.storage import configs, files, torchrun
from fusenorm_openood.training.recipes import Recipe, find_recipe

CHECK_EVERY = 50  # steps between checks of the loss, each of which waits for the device


class Progress(NamedTuple):
    """The progress of a training run after an epoch."""

    epochs: int = 0
    best_accuracy: float = -1.0


@contextmanager
def processes(device: torch.device) -> Iterator[torchrun.Process]:
    """Join the processes that `torchrun` started, if any.

    ConfigError for a device on which several processes cannot train.
    """
    process = torchrun.this_process()
    if process.world == 1:
        yield process
        return
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise errors.ConfigError(
            f"the device of {process.world} processes must be 'cuda', with one GPU per process, or "
            f"'cpu', got {str(device)!r}"
        )
    if device.type == "cuda":
        if process.local_rank >= torch.cuda.device_count():
            raise errors.ConfigError(
                f"the local rank must be < {torch.cuda.device_count()}, the number of CUDA "
                f"devices, got {process.local_rank}: start one process per device"
            )
        torch.cuda.set_device(process.local_rank)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield process
    finally:
        distributed.destroy_process_group()


def wait(process: torchrun.Process) -> None:
    """Wait until all processes have reached this point."""
    if process.world > 1:
        distributed.barrier()


def train(
    recipe: Recipe,
    benchmark: benchmarks.Benchmark,
    folder: str | Path,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    channels_last: bool = False,
    progress: bool = True,
    process: torchrun.Process | None = None,
) -> Path:
    """Train a network on a benchmark's ID images, or resume an interrupted run.

    Everything that the next epoch needs is saved after each one, so that a resumed run ends with
    the same weights: on a CPU they are bitwise the same with the same number of processes and
    workers. Several processes, see `processes`, share the work, each with its own batches; the
    first one writes. Returns the path of `best.ckpt` in the folder, from the epoch with the best
    validation accuracy, the last one if several are equal; a finished run is not trained again.

    Raises:
        DataError: labels outside the network's classes.
        NonFiniteError: the loss became NaN or infinite; the last good checkpoint stays.
        CheckpointError: the folder holds a run of another recipe, or `init` does not fit.
        ConfigError: `channels_last` on a CPU with a network that is too narrow for it, or a batch
            that the processes cannot share evenly.
    """
    folder, device, process = Path(folder), torch.device(device), process or torchrun.Process()
    best, unfinished = folder / "best.ckpt", folder / "unfinished.ckpt"
    _check_recipe(folder / "recipe.yml", recipe)
    if best.is_file() and not unfinished.is_file():
        return best
    if channels_last and device.type == "cpu" and recipe.width < 8:
        # https://github.com/uxlfoundation/oneDNN/issues/6035
        raise errors.ConfigError(
            "width must be >= 8 for channels_last on a CPU, below which oneDNN computes wrong "
            f"gradients, got {recipe.width}: train without channels_last"
        )
    batch_size = recipe.batch_per_process(process.world)
    benchmark.check_labels([benchmark.id["train"], benchmark.id["val"]])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    on_cuda = device.type == "cuda"
    # Two threads for digits, so that the weights do not depend on the number of cores.
    limited = threads(2) if benchmark.name == "digits" else nullcontext()
    with limited, torch.random.fork_rng([device] if on_cuda else []):
        torch.manual_seed(recipe.seed)
        with on_cpu():
            net = recipe.build(benchmark.num_classes).float()
        if recipe.init is not None:
            load_backbone(net, recipe.init)
        net.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        sgd: dict[str, Any] = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        optimiser = SGD(net.parameters(), recipe.lr, nesterov=True, **sgd)
        done = resume(unfinished, net, optimiser)
        if process.leads and not unfinished.is_file():
            settings = yaml.safe_dump(asdict(recipe), sort_keys=False)
            files.write_whole(folder / "recipe.yml", lambda file: file.write_text(settings))
            # From here on, best.ckpt without unfinished.ckpt means that the run is finished.
            save_progress(unfinished, net, optimiser, done)
        if process.leads and done.epochs and not best.is_file():  # deleted by the user
            _save(best, net)
            done = done._replace(best_accuracy=-1.0)
        loader = make_loader(benchmark, batch_size, recipe.seed, process, num_workers, on_cuda)
        val_loader = benchmarks.image_loader(benchmark.id["val"], num_workers=num_workers)
        model = net
        if process.world > 1:
            if on_cuda:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
            ours = [process.local_rank] if on_cuda else None
            model = nn.parallel.DistributedDataParallel(model, ours)
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
                    save_progress(unfinished, net, optimiser, done)
                wait(process)
        if process.leads:
            unfinished.unlink()
    return best


def train_epoch(
    model: nn.Module,
    optimiser: SGD,
    loader: DataLoader[Any],
    recipe: Recipe,
    epoch: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
    bar: "tqdm[Any] | None" = None,
) -> float:
    """Train for one pass over the training images, and return the mean loss.

    NonFiniteError if the loss became NaN or infinite within the last `CHECK_EVERY` steps.
    """
    model.train()
    device, steps, losses = device_of(model), len(loader), []
    bar = tqdm(disable=True) if bar is None else bar
    for step, (images, labels) in enumerate(batches(loader), start=epoch * steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate(step, recipe.epochs * steps)
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        target = torch.from_numpy(_required(labels)).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16) if recipe.amp else nullcontext():
            loss = nn.functional.cross_entropy(model(images), target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
        if len(losses) % CHECK_EVERY == 0 or len(losses) == steps:
            finite = torch.stack(losses).isfinite()
            if not finite.all():
                first = int((~finite).nonzero()[0, 0])
                raise errors.NonFiniteError(
                    f"the loss is {losses[first].item()} at step {epoch * steps + first + 1}: the "
                    "last good checkpoint stays; lower the learning rate"
                )
            bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1].item():.3f}", refresh=False)
        bar.update()
    return float(torch.stack(losses).mean())


@torch.no_grad()
def validation_accuracy(net: nn.Module, loader: Iterable[Any]) -> float:
    """Accuracy over a loader; leaves the network in eval mode."""
    net.eval()
    device = device_of(net)
    rows = [
        (net(images.to(device)).argmax(1).cpu().numpy(), _required(labels))
        for images, labels in batches(loader)
    ]
    pred, label = (np.concatenate(column) for column in zip(*rows, strict=True))
    return accuracy(pred, label)


def _required(labels: Labels | None) -> Labels:
    if labels is None:
        raise errors.DataError(
            "training needs one integer label per image, got a batch without labels"
        )
    return labels


def _check_recipe(path: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if a folder holds a run of another recipe, finished or not."""
    if not path.is_file():  # no run, or one that was trained elsewhere
        return
    begun = configs.read_config(path)
    for name, value in asdict(recipe).items():
        if begun.get(name) != value:
            raise errors.CheckpointError(
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


def make_loader(
    benchmark: benchmarks.Benchmark,
    batch_size: int,
    seed: int,
    process: torchrun.Process,
    num_workers: int = 0,
    pinned: bool = False,
) -> CpuLoader:
    """Augmented training images in random order, in this process's batches of `batch_size`."""
    images = benchmark.id["train"].images()
    images.transform = preprocessing.train_transform(
        benchmark.pre_size,
        benchmark.image_size,
        benchmark.norm,
        flip=benchmark.name != "digits",
        zoom=benchmark.name.startswith("imagenet"),
    )
    sampler = None
    if process.world > 1:
        sampler = DistributedSampler[Any](images, process.world, process.rank, seed=seed)
    how: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pinned}
    return CpuLoader(images, batch_size, shuffle=sampler is None, sampler=sampler, **how)


def _save(path: Path, net: nn.Module) -> None:
    """Save a network's weights on the CPU."""
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    files.write_whole(path, partial(torch.save, state))


def save_progress(path: Path, net: nn.Module, optimiser: SGD, done: Progress) -> None:
    """Save everything that the next epoch needs."""
    states = {"net": net.state_dict(), "optimiser": optimiser.state_dict()}
    files.write_whole(path, partial(torch.save, {**states, "progress": tuple(done)}))


def resume(path: Path, net: nn.Module, optimiser: SGD) -> Progress:
    """Restore network and optimiser from an interrupted run, if there is one.

    DamagedFileError if the file is damaged, CheckpointError if it cannot be opened, or holds no run
    of this network. Other errors, such as running out of memory, are passed on, since the file is
    intact.
    """
    if not path.is_file():
        return Progress()
    try:
        content = read_saved(path)
    except errors.DamagedFileError as error:
        raise errors.DamagedFileError(f"{error}, or remove it to start the run again") from None

    def shapes(state: Any) -> Any:
        return {k: getattr(v, "shape", None) for k, v in state.items()} if state else None

    is_run = isinstance(content, dict) and set(content) == {"net", "optimiser", "progress"}
    if not is_run or shapes(content["net"]) != shapes(net.state_dict()):
        raise errors.CheckpointError(
            f"{path} holds no interrupted run of {type(net).__name__}: remove it to start again"
        )
    net.load_state_dict(content["net"])
    optimiser.load_state_dict(content["optimiser"])
    return Progress(*content["progress"])


def log(path: Path, epoch: int, loss: float, reached: float) -> None:
    """Append an epoch to the run's log, in place of a row whose epoch was not completed."""
    lines = path.read_text(encoding="utf-8").splitlines() if epoch and path.is_file() else []
    lines = lines[: epoch + 1] or ["epoch,loss,val_acc"]
    lines.append(f"{epoch + 1},{loss:.4f},{100 * reached:.2f}")
    files.write_whole(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))


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
    digits.write_digits(data_root)
    benchmark = benchmarks.load_benchmark("digits", data_root)
    return train(recipe, benchmark, Path(root) / f"s{seed}", progress=progress)
