"""State dicts in the forms in which training code saves them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.networks.saved import read_saved

State = dict[str, Tensor]

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


def load_state(path: str | Path) -> State:
    """The state dict in a checkpoint file, loaded without running any code from it.

    Keys are without `module.` and `_orig_mod.`; counters of averaged weights are left out.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    content = read_saved(Path(path))
    state = find_state(content)
    if not state:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else ""
        raise CheckpointError(
            f"{path} must hold a non-empty state dict of tensors, got a {type(content).__name__}"
            f"{f' with the keys {keys[:80]}' if keys else ''}: save net.state_dict() with "
            "torch.save"
        )
    bare = {without_wrappers(key): value for key, value in state.items()}
    return {key: value for key, value in bare.items() if not _EXTRAS.fullmatch(key)}


def find_state(content: Any) -> State:
    """The tensors of the network in the content of a checkpoint; empty if there are none."""
    if not isinstance(content, dict):
        return {}
    for name in CONTAINERS:
        if state := find_state(content.get(name)):
            return state
    return {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}


def without_wrappers(key: str) -> str:
    """A key without `module.` and `_orig_mod.`.

    >>> without_wrappers("module._orig_mod.backbone.module.conv1.weight")
    'backbone.conv1.weight'
    """
    return _WRAPPERS.sub(r"\1", key)


def aligned(state: State, keys: Iterable[str]) -> State:
    """A state dict without those leading parts that all its keys share and `keys` do not have.

    Its last layer is called `fc` where that is what `keys` have.
    """
    wanted = set(keys)
    forms = [*_forms(state), *(_with_fc(form) for form in _forms(state))]
    return max(forms, key=lambda form: len(form.keys() & wanted))


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
