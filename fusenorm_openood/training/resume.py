"""The state of a training run, saved after every epoch so that an interrupted run can resume."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD

from fusenorm_openood.configs import read_config
from fusenorm_openood.errors import CheckpointError, DamagedFileError
from fusenorm_openood.files import write_whole
from fusenorm_openood.networks.saved import read_saved
from fusenorm_openood.training.recipes import Recipe


class Progress(NamedTuple):
    """The progress of a training run after an epoch."""

    epochs: int
    best_accuracy: float


def keep(path: Path, net: nn.Module, optimiser: SGD, done: Progress) -> None:
    """Save everything that the next epoch needs."""
    content = {
        "net": net.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": tuple(done),
    }
    write_whole(path, partial(torch.save, content))


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
    own = {name: value.shape for name, value in net.state_dict().items()}
    return isinstance(state, dict) and own == {
        n: getattr(v, "shape", None) for n, v in state.items()
    }


def check_recipe(path: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if a folder holds a run of another recipe, finished or not."""
    if not path.is_file():  # no run, or one that was trained elsewhere
        return
    begun, requested = read_config(path), recipe.as_dict()
    other = [name for name in requested if begun.get(name) != requested[name]]
    if other:
        raise CheckpointError(
            f"{other[0]} must be {begun.get(other[0])}, as in the run in {path.parent}, got "
            f"{requested[other[0]]}: use the same recipe or another folder"
        )
