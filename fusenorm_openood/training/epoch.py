"""One epoch of training, in one process or several."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader
from tqdm import tqdm

from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError
from fusenorm_openood.forward.batches import Labels, batches
from fusenorm_openood.kernels.devices import device_of
from fusenorm_openood.method.metrics import accuracy
from fusenorm_openood.storage.torchrun import Process, this_process
from fusenorm_openood.training.recipes import Recipe

CHECK_EVERY = 50  # steps between checks of the loss, each of which waits for the device


@contextmanager
def processes(device: torch.device) -> Iterator[Process]:
    """Join the processes that `torchrun` started, if any.

    Raises:
        ConfigError: a device on which several processes cannot train.
    """
    process = this_process()
    if process.world == 1:
        yield process
        return
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ConfigError(
            f"the device of {process.world} processes must be 'cuda', with one GPU per process, or "
            f"'cpu', got {str(device)!r}"
        )
    if device.type == "cuda":
        if process.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"the local rank must be < {torch.cuda.device_count()}, the number of CUDA "
                f"devices, got {process.local_rank}: start one process per device"
            )
        torch.cuda.set_device(process.local_rank)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield process
    finally:
        distributed.destroy_process_group()


def wait(process: Process) -> None:
    """Wait until all processes have reached this point."""
    if process.world > 1:
        distributed.barrier()


def data_parallel(net: nn.Module, process: Process, device: torch.device) -> nn.Module:
    """The network, wrapped so that all processes train it together."""
    if process.world == 1:
        return net
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(net, [process.local_rank])
    return DistributedDataParallel(net)


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

    Raises:
        NonFiniteError: the loss became NaN or infinite within the last `CHECK_EVERY` steps.
    """
    model.train()
    device = device_of(model)
    steps, losses = len(loader), []
    for index, (images, labels) in enumerate(batches(loader)):
        step = epoch * steps + index
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate(step, recipe.epochs * steps)
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        target = torch.from_numpy(_required(labels)).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16) if recipe.amp else nullcontext():
            loss = F.cross_entropy(model(images), target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
        if len(losses) % CHECK_EVERY == 0 or index + 1 == steps:
            finite = torch.stack(losses).isfinite()
            if not finite.all():
                first = int((~finite).nonzero()[0, 0])
                raise NonFiniteError(
                    f"the loss is {losses[first].item()} at step {epoch * steps + first + 1}: the "
                    "last good checkpoint is kept; lower the learning rate"
                )
            if bar is not None:
                bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1].item():.3f}", refresh=False)
        if bar is not None:
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
        raise DataError("training needs one integer label per image, got a batch without labels")
    return labels
