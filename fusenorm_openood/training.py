"""Training a classifier by cross-entropy, with OpenOOD's optimiser and schedule."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.data.preprocessing import train_transform
from fusenorm_openood.files import write_whole
from fusenorm_openood.forward import device_of
from fusenorm_openood.metrics import accuracy
from fusenorm_openood.networks import ResNet18_32x32
from fusenorm_openood.scoring import batches

DIGITS_WIDTH, DIGITS_EPOCHS, DIGITS_LR = 16, 12, 0.1
DIGITS_RUN = f"digits_resnet18_32x32_base_e{DIGITS_EPOCHS}_lr{DIGITS_LR}_default"


def train_classifier(
    net: nn.Module,
    train_loader: DataLoader[Any],
    val_loader: Iterable[Any],
    epochs: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Train a network by cross-entropy: SGD with Nesterov momentum, cosine schedule a step.

    Returns:
        The state dict after the epoch of the best validation accuracy, the last one of equals.
    """
    optimiser = SGD(net.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=True)
    schedule = CosineAnnealingLR(optimiser, epochs * len(train_loader))
    device, best, best_accuracy = device_of(net), {}, -1.0
    for _ in (bar := tqdm(range(epochs), desc="train", unit="epoch", disable=not progress)):
        net.train()
        for images, labels in batches(train_loader):
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        reached = validation_accuracy(net, val_loader)
        bar.set_postfix(loss=f"{loss.item():.3f}", val_acc=f"{100 * reached:.2f}")
        if reached >= best_accuracy:
            best_accuracy = reached
            best = {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}
    return best


@torch.no_grad()
def validation_accuracy(net: nn.Module, loader: Iterable[Any]) -> float:
    """Share of right predictions over a loader; leaves the network in evaluation mode."""
    net.eval()
    device = device_of(net)
    rows = [(net(images.to(device)).argmax(1).cpu(), labels) for images, labels in batches(loader)]
    pred, label = (torch.cat(column) for column in zip(*rows, strict=True))
    return accuracy(pred, label)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on at most so many threads, and give it back those it had."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(count, before))
        yield
    finally:
        torch.set_num_threads(before)


def train_digits(
    data_root: str | Path, root: str | Path, seed: int = 0, progress: bool = True
) -> Path:
    """Write the digits benchmark and train its network, each unless it is there already.

    Args:
        data_root: where the images and lists go.
        root: folder of the training runs; this one goes into its subfolder ``s<seed>``.
        seed: of the weights and of the order of the images.

    Returns:
        The checkpoint's path.
    """
    checkpoint = Path(root) / f"s{seed}" / "best.ckpt"
    write_digits(data_root)
    if checkpoint.is_file():
        return checkpoint
    benchmark = load_benchmark("digits", data_root)
    images = benchmark.id["train"].images()
    images.transform = train_transform(
        benchmark.pre_size, benchmark.image_size, benchmark.norm, flip=False
    )
    # Two threads, so that the weights are the same on machines with more.
    with torch.random.fork_rng(devices=[]), threads(2):
        torch.manual_seed(seed)
        net = ResNet18_32x32(benchmark.num_classes, width=DIGITS_WIDTH)
        train_loader = DataLoader(images, batch_size=64, shuffle=True)
        val_loader = image_loader(benchmark.id["val"])
        state = train_classifier(
            net, train_loader, val_loader, DIGITS_EPOCHS, DIGITS_LR, progress=progress
        )
    write_whole(checkpoint, partial(torch.save, state))
    return checkpoint
