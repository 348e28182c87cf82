"""Training a classifier by cross-entropy or T2FNorm, with OpenOOD's optimiser and schedule."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from fusenorm_openood.data.benchmarks import Benchmark, image_loader, load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.data.transforms import train_transform
from fusenorm_openood.devices import device_of
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError
from fusenorm_openood.files import write_whole
from fusenorm_openood.listening.batches import batches
from fusenorm_openood.method.metrics import accuracy
from fusenorm_openood.networks.checkpoints import State, load_backbone
from fusenorm_openood.training.processes import Process, threads, together
from fusenorm_openood.training.recipes import Recipe, find_recipe
from fusenorm_openood.training.resume import Progress, check_recipe, keep, resume

CHECK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device


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
    """Train a network on a benchmark's ID images, or go on where an interrupted run stopped.

    After each epoch everything that the next one needs is written, so that an interrupted run
    ends with the same weights: on a CPU to the last bit, with as many processes and workers as
    before. Several processes share the work, each with batches of its own; the first one writes.

    Args:
        recipe: what is trained, and how.
        benchmark: the images, all there; see :meth:`Benchmark.missing`.
        folder: of the run; ``best.ckpt`` is the epoch of the best validation accuracy, the last
            one of equals.
        device: where to train.
        num_workers: processes that load images.
        channels_last: memory format of images and weights.
        progress: show a bar.
        process: this one among several, see :func:`processes`; None = it trains alone.

    Returns:
        The path of ``best.ckpt``; a run that is there already is not trained again.

    Raises:
        DataError: labels that the network has no class for.
        NonFiniteError: the loss turned NaN or infinite; the last good checkpoint stays.
        CheckpointError: the folder holds a run of another recipe, or ``init`` does not fit.
        ConfigError: ``channels_last`` on a CPU with a network that is too narrow for it.
    """
    folder, device, process = Path(folder), torch.device(device), process or Process()
    best, unfinished = folder / "best.ckpt", folder / "unfinished.ckpt"
    check_recipe(folder / "recipe.yml", recipe)
    if best.is_file() and not unfinished.is_file():
        return best
    if channels_last and device.type == "cpu" and recipe.width < 8:
        # https://github.com/uxlfoundation/oneDNN/issues/6035
        raise ConfigError(
            f"width = {recipe.width} found: below 8, oneDNN gets gradients in channels_last wrong, "
            "train without channels_last"
        )
    images, val = benchmark.id["train"].images(), benchmark.id["val"].images()
    for listed in (images, val):
        check_labels(listed, benchmark.num_classes)
    images.transform = train_transform(
        benchmark.pre_size,
        benchmark.image_size,
        benchmark.norm,
        flip=benchmark.name != "digits",
        zoom=benchmark.name.startswith("imagenet"),
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    devices = [device] if device.type == "cuda" else []
    # Two threads for digits, so that the weights are the same on machines with more.
    few = threads(2) if benchmark.name == "digits" else nullcontext()
    with few, torch.random.fork_rng(devices):
        torch.manual_seed(recipe.seed)
        net = recipe.build(benchmark.num_classes)
        if recipe.init is not None:
            load_backbone(net, recipe.init)
        net.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        optimiser = SGD(
            net.parameters(),
            recipe.lr,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
        )
        done = resume(unfinished, net, optimiser)
        if process.leads and not unfinished.is_file():
            settings = yaml.safe_dump(recipe.as_dict(), sort_keys=False)
            write_whole(folder / "recipe.yml", lambda file: file.write_text(settings))
            # From here on best.ckpt alone is a finished run, and never one that was cut short.
            keep(unfinished, net, optimiser, done)
        if process.leads and done.epochs and not best.is_file():  # removed by hand
            write_whole(best, partial(torch.save, state_on_cpu(net)))
            done = done._replace(best_accuracy=-1.0)
        sampler = DistributedSampler[Any](images, seed=recipe.seed) if process.world > 1 else None
        train_loader = DataLoader(
            images,
            recipe.batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
        )
        val_loader = image_loader(benchmark.id["val"], num_workers=num_workers)
        model = together(net, process, device)
        steps = recipe.epochs * len(train_loader)
        with tqdm(
            total=steps,
            initial=done.epochs * len(train_loader),
            desc="train",
            unit="step",
            disable=not (progress and process.leads),
        ) as bar:
            for epoch in range(done.epochs, recipe.epochs):
                # Every epoch starts from a random state of its own: nothing to keep but its number.
                torch.manual_seed((recipe.seed * 10_000 + epoch) * 1_000 + process.rank)
                if sampler is not None:
                    sampler.set_epoch(epoch)
                loss = train_epoch(
                    model, optimiser, train_loader, recipe, epoch, memory_format, bar
                )
                if process.leads:
                    reached = validation_accuracy(net, val_loader)
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", val=f"{100 * reached:.2f}")
                    if reached >= done.best_accuracy:
                        write_whole(best, partial(torch.save, state_on_cpu(net)))
                    log(folder / "log.csv", epoch, loss, reached)
                    done = Progress(epoch + 1, max(reached, done.best_accuracy))
                    keep(unfinished, net, optimiser, done)
                process.wait()
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
    """One pass over the training images; the mean loss.

    Raises:
        NonFiniteError: the loss turned NaN or infinite, within the last ``CHECK_EVERY`` steps.
    """
    model.train()
    device = device_of(model)
    steps, losses = len(loader), []
    for index, (images, labels) in enumerate(batches(loader)):
        step = epoch * steps + index
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate(step, recipe.epochs * steps)
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        with torch.autocast(device.type, torch.bfloat16) if recipe.amp else nullcontext():
            loss = F.cross_entropy(model(images), labels.to(device, non_blocking=True))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
        if len(losses) % CHECK_EVERY == 0 or index + 1 == steps:
            check_losses(losses, epoch * steps)
            if bar is not None:
                bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1].item():.3f}", refresh=False)
        if bar is not None:
            bar.update()
    return float(torch.stack(losses).mean())


@torch.no_grad()
def validation_accuracy(net: nn.Module, loader: Iterable[Any]) -> float:
    """Share of right predictions over a loader; leaves the network in evaluation mode."""
    net.eval()
    device = device_of(net)
    rows = [(net(images.to(device)).argmax(1).cpu(), labels) for images, labels in batches(loader)]
    pred, label = (torch.cat(column) for column in zip(*rows, strict=True))
    return accuracy(pred, label)


def check_labels(images: ImageList, num_classes: int) -> None:
    """DataError unless all labels are classes of a network."""
    for number, (name, label) in enumerate(images.entries, start=1):
        if not 0 <= label < num_classes:
            raise DataError(
                f"{images.path}, line {number}: {name} has the label {label}, and the network has "
                f"the classes 0 to {num_classes - 1}: give the list of this data set"
            )


def check_losses(losses: list[Tensor], before: int) -> None:
    """NonFiniteError at the first loss of an epoch that is not finite."""
    finite = torch.stack(losses).isfinite()
    if not finite.all():
        step = int((~finite).nonzero()[0, 0])
        raise NonFiniteError(
            f"the loss is {losses[step].item()} at step {before + step + 1}: the last good "
            "checkpoint is kept; train with a smaller learning rate"
        )


def log(path: Path, epoch: int, loss: float, reached: float) -> None:
    """Add an epoch to the run's table, or put it in the place of one that was not kept."""
    lines = path.read_text(encoding="utf-8").splitlines() if epoch and path.is_file() else []
    lines = lines[: epoch + 1] or ["epoch,loss,val_acc"]
    lines.append(f"{epoch + 1},{loss:.4f},{100 * reached:.2f}")
    write_whole(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def state_on_cpu(net: nn.Module) -> State:
    """A network's weights as a checkpoint holds them."""
    return {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}


def train_digits(
    data_root: str | Path,
    root: str | Path,
    seed: int = 0,
    method: str = "base",
    progress: bool = True,
) -> Path:
    """Write the digits benchmark and train a network on it, each unless it is there already.

    Args:
        data_root: where the images and lists go.
        root: folder of the training runs; this one goes into its subfolder ``s<seed>``.
        seed, method: of the recipe.
        progress: show a bar.

    Returns:
        The checkpoint's path.
    """
    recipe = find_recipe("digits", seed=seed, method=method)
    write_digits(data_root)
    benchmark = load_benchmark("digits", data_root)
    return train(recipe, benchmark, Path(root) / f"s{seed}", progress=progress)
