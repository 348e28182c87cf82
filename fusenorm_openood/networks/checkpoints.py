"""Load networks from checkpoint files; the keys determine the architecture."""

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import CheckpointError, DamagedFileError
from fusenorm_openood.networks.cifar_resnet import CifarResNet
from fusenorm_openood.networks.resnet import (
    ResNet18_32x32,
    ResNet18_224x224,
    ResNet50,
    WideResNet,
)
from fusenorm_openood.networks.t2fnorm import T2FNormNet

State = dict[str, Tensor]
ARCHITECTURES = (
    "ResNet18_32x32, ResNet18_224x224, ResNet50, WideResNet, CifarResNet, T2FNormNet around one"
)


def load_network(path: str | Path, num_classes: int | None = None) -> nn.Module:
    """The network of a checkpoint, in float32 on the CPU and in evaluation mode.

    Accepts state dicts of OpenOOD's networks, plain or T2FNorm's, and of CIFAR's ResNets, also with
    the prefix `module.` of data-parallel training, under a key `state_dict`, or in half precision.

    Args:
        path: checkpoint file.
        num_classes: expected number of classes; None = as in the checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, holds no known network, or has another
            number of classes.
    """
    state = load_state(path)
    t2fnorm = "tau" in state and any(key.startswith("backbone.") for key in state)
    prefix = "backbone." if t2fnorm else ""
    plain = {key.removeprefix(prefix): value for key, value in state.items() if key != "tau"}
    build = _recognise(plain)
    if build is None or "fc.weight" not in plain:
        raise CheckpointError(
            f"{path} must hold the state dict of a known network ({ARCHITECTURES}), got the keys "
            f"{', '.join(sorted(state)[:3])}, ..."
        )
    classes = len(plain["fc.weight"])
    if num_classes is not None:
        check_classes(path, classes, num_classes)
    net = build(classes)
    if t2fnorm:
        net = T2FNormNet(net, classes)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} looks like a {type(net).__name__} but does not fit it "
            f"({str(error).splitlines()[-1].strip()}): the known networks are {ARCHITECTURES}"
        ) from None
    return net.eval()


def load_backbone(net: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's weights into a network; each may be plain or T2FNorm's.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit the network.
    """
    state = load_state(path)
    plain = {key.removeprefix("backbone."): v for key, v in state.items() if key != "tau"}
    target = net.backbone if isinstance(net, T2FNormNet) else net
    try:
        target.load_state_dict(plain)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit a {type(target).__name__} "
            f"({str(error).splitlines()[-1].strip()}): start from a checkpoint of that network"
        ) from None


def check_classes(path: str | Path, classes: int, num_classes: int) -> None:
    """Raise CheckpointError unless a checkpoint has as many classes as the ID data set."""
    if classes != num_classes:
        raise CheckpointError(
            f"{path} must have {num_classes} classes, as the ID data set does, got {classes}: use "
            "a checkpoint and an ID data set that belong together"
        )


def load_state(path: str | Path) -> State:
    """The state dict in a checkpoint file, loaded without running any code from it.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    path = Path(path)
    state = read_saved(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if (
        not isinstance(state, dict)
        or not state
        or not all(torch.is_tensor(v) for v in state.values())
    ):
        raise CheckpointError(
            f"{path} must hold a non-empty state dict of tensors, got a {type(state).__name__}: "
            "save net.state_dict() with torch.save"
        )
    keys = {key: re.sub(r"^linear\.", "fc.", str(key).removeprefix("module.")) for key in state}
    return {keys[key]: value for key, value in state.items()}


def read_saved(path: Path) -> Any:
    """The content of a file written by `torch.save`, on the CPU; tensors and containers only.

    Errors that are not the file's fault, such as running out of memory, are passed on.

    Raises:
        DamagedFileError: the file is truncated or altered, or was not written by `torch.save`.
        CheckpointError: the file is missing, cannot be opened, or holds objects that cannot be
            loaded without running code.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} not found: give the path of a file") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be opened: {error.strerror}") from None
    damaged = DamagedFileError(
        f"checkpoint {path} of {path.stat().st_size} bytes cannot be read: it is damaged or was "
        "not written by torch.save, copy it again"
    )
    # A damaged archive may still load, with wrong numbers, so its checksums are verified.
    if is_archive and not _is_intact(path):
        raise damaged
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"checkpoint {path} holds more than tensors, which cannot be loaded without "
                "running its code: save net.state_dict() instead"
            ) from None
        raise damaged from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        if is_archive or "memory" in str(error):  # the file is intact, or not at fault
            raise
        raise damaged from None


def _is_intact(path: Path) -> bool:
    """Whether every member of a zip archive matches its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError):
        return False


def _recognise(state: State) -> Callable[[int], nn.Module] | None:
    """A function from the number of classes to the plain network with these keys, if known."""
    stem = state.get("conv1.weight")
    if stem is None or stem.ndim != 4:
        return None
    if "block1.layer.0.conv1.weight" in state:
        blocks = {m[1] for key in state if (m := re.match(r"block1\.layer\.(\d+)\.", key))}
        widen = len(state["block1.layer.0.conv1.weight"]) // 16
        return lambda classes: WideResNet(6 * len(blocks) + 4, widen, classes)
    stages = [
        {m[1] for key in state if (m := re.match(rf"layer{stage}\.(\d+)\.conv1", key))}
        for stage in range(1, 5)
    ]
    if not stages[3] and stages[0] and len({len(blocks) for blocks in stages[:3]}) == 1:
        return lambda classes: CifarResNet(6 * len(stages[0]) + 2, classes, width=len(stem))
    if "layer1.0.conv3.weight" in state:
        return ResNet50
    if "layer2.0.downsample.0.weight" in state:
        return ResNet18_224x224
    if "layer2.0.shortcut.0.weight" in state:
        return lambda classes: ResNet18_32x32(classes, width=len(stem))
    return None
