"""State dicts in the forms in which training code saves them, read without running code."""

import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fusenorm_openood.errors import CheckpointError, DamagedFileError

State = dict[str, Tensor]

SAFETENSORS_HEADER = 100_000_000  # bytes; the format's limit
# Where checkpoints keep their weights, the first found first: plain weights before averaged ones.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
# Names of the last linear layer; this package's networks call it `fc`, as OpenOOD's do.
HEADS = ("fc", "linear", "head", "classifier")
# What data-parallel training, averaging and compilation put in front of keys, at any depth.
_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
# Counters of averaged weights, and weights of the loss: neither is part of the network.
_EXTRAS = re.compile(r"(?:.*\.)?(?:n_averaged|num_updates)|(?:criterion|loss|loss_fn)\..*")
# What zipfile, safetensors and torch raise for a file that is damaged, or is something else.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, SafetensorError, pickle.UnpicklingError, RuntimeError),
    *(EOFError, ValueError, KeyError, IndexError, OSError),
)


def read_saved(path: Path) -> Any:
    """The tensors and containers in a file of `torch.save` or safetensors, on the CPU.

    DamagedFileError if it is truncated or altered, or was written by neither; CheckpointError if it
    is missing, cannot be opened, or cannot be loaded without running code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} not found: give the path of a file") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be opened: {error.strerror}") from None
    is_archive, is_intact = start[:2] == b"PK", False
    header = int.from_bytes(start[:8], "little")  # its length, before the JSON that it is
    try:
        if start[8:] == b"{" and header <= SAFETENSORS_HEADER and not is_archive:
            return load_file(path)
        if is_archive:  # a damaged one may still load, with wrong numbers: verify its checksums
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    raise zipfile.BadZipFile(member)
            is_intact = True
        with path.open("rb") as file:  # by its content; by its path, some torch go by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        text = str(error)
        if "Unsupported global" in text or "Unsupported class" in text:
            why = "holds more than tensors, which cannot be loaded without running its code"
        elif "TorchScript" in text or "file data.pkl" in text:
            why = "holds a program and not weights"
        elif "memory" in text or (is_intact and not isinstance(error, pickle.UnpicklingError)):
            raise  # the file is not at fault
        else:
            raise DamagedFileError(
                f"checkpoint {path} of {path.stat().st_size} bytes cannot be read: it is damaged "
                "or was written by neither torch.save nor safetensors, copy it again"
            ) from None
        raise CheckpointError(f"checkpoint {path} {why}: save net.state_dict() instead") from None


def load_state(path: str | Path) -> State:
    """The state dict in a checkpoint file; CheckpointError if it has no state dict.

    Keys are without `module.` and `_orig_mod.`; counters of averaged weights are left out.
    """
    content = read_saved(Path(path))
    state = _find_state(content)
    if not state:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else ""
        raise CheckpointError(
            f"{path} must hold a non-empty state dict of tensors, got {type(content).__name__}"
            f"{f' with the keys {keys[:80]}' if keys else ''}: save net.state_dict() with "
            "torch.save"
        )
    bare = {without_wrappers(key): value for key, value in state.items()}
    return {key: value for key, value in bare.items() if not _EXTRAS.fullmatch(key)}


def _find_state(content: Any) -> State:
    """The tensors of the network in the content of a checkpoint; empty if there are none."""
    if not isinstance(content, dict):
        return {}
    for name in CONTAINERS:
        if state := _find_state(content.get(name)):
            return state
    return {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}


def without_wrappers(key: str) -> str:
    """A key without `module.` and `_orig_mod.` at any depth."""
    return _WRAPPERS.sub(r"\1", key)


def aligned(state: State, keys: Iterable[str]) -> State:
    """A state dict without those leading parts that all its keys share and `keys` do not have.

    Its last layer is called `fc` where that is what `keys` have.
    """
    wanted = set(keys)
    forms = [*_forms(state), *(_with_fc(form) for form in _forms(state))]
    return max(forms, key=lambda form: len(form.keys() & wanted))


def _forms(state: State) -> Iterator[State]:
    """The state dict with none, one, two, ... leading parts removed that all keys share."""
    yield state
    first, dot, _ = next(iter(state), "").partition(".")
    if dot and all(key.startswith(first + dot) for key in state):
        yield from _forms({key.removeprefix(first + dot): v for key, v in state.items()})


def _with_fc(state: State) -> State:
    """The state dict with its last layer called `fc`, if it has another of the usual names."""
    found = [name for name in HEADS if f"{name}.weight" in state]
    if len(found) != 1:
        return state
    return {re.sub(rf"^{found[0]}\.", "fc.", key): value for key, value in state.items()}


def misfit(net: nn.Module, state: State) -> str:
    """The first reason why a state dict is not that of a network; empty if it is.

    Counters of batch normalisation may be missing, as in old checkpoints.
    """
    own = {key: value for key, value in net.state_dict().items() if torch.is_tensor(value)}
    for key, value in own.items():
        if key not in state and not key.endswith("num_batches_tracked"):
            return f"key {key!r} is missing"
        if key in state and state[key].shape != value.shape:
            return f"{key!r} must be {list(value.shape)}, got {list(state[key].shape)}"
    return next((f"key {key!r} is unexpected" for key in state if key not in own), "")


def in_order(net: nn.Module, state: State) -> dict[str, str]:
    """The key that each weight of a network has in a state dict with other keys, by order.

    Empty unless all shapes agree, but for one number of classes, and no name says another kind,
    such as `bias` for `weight`. Sorted keys, as of safetensors, are in no order.
    """
    own, theirs = (
        {k: v.shape for k, v in s.items() if torch.is_tensor(v) and "num_batches" not in k}
        for s in (net.state_dict(), state)
    )
    if len(own) != len(theirs) or set(own) == set(theirs) or list(theirs) == sorted(theirs):
        return {}
    rows = set[int]()
    for (ours, a), (key, b) in zip(own.items(), theirs.items(), strict=True):
        kinds = {ours.rpartition(".")[2], key.rpartition(".")[2]}
        if (len(kinds) > 1 and kinds <= _KINDS) or len(a) != len(b) or a[1:] != b[1:]:
            return {}
        rows |= {b[0]} if a != b else set()
    return dict(zip(own, theirs, strict=True)) if len(rows) < 2 else {}


_KINDS = {"weight", "bias", "running_mean", "running_var"}
