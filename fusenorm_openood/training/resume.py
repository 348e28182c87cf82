"""Where a training run stands, kept after every epoch so that an interrupted one can resume."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import SGD

from fusenorm_openood.configs import read_config
from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.files import write_whole
from fusenorm_openood.training.recipes import Recipe


class Progress(NamedTuple):
    """Where a training run stands after an epoch."""

    epochs: int
    best_accuracy: float


def keep(path: Path, net: nn.Module, optimiser: SGD, done: Progress) -> None:
    """Write all that the next epoch needs."""
    content = {
        "net": net.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": tuple(done),
    }
    write_whole(path, partial(torch.save, content))


def resume(path: Path, net: nn.Module, optimiser: SGD) -> Progress:
    """Bring network and optimiser to where an interrupted run stopped, if there is one."""
    if not path.is_file():
        return Progress(0, -1.0)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(content["net"])
        optimiser.load_state_dict(content["optimiser"])
        return Progress(*content["progress"])
    except Exception:  # damaged files make torch raise errors of many kinds
        raise CheckpointError(
            f"unfinished run {path} cannot be read: remove it to start again"
        ) from None


def check_recipe(path: Path, recipe: Recipe) -> None:
    """CheckpointError where a folder holds a run, finished or not, of another recipe."""
    if not path.is_file():  # no run, or one that was trained elsewhere
        return
    begun, asked = read_config(path), recipe.as_dict()
    other = [name for name in asked if begun.get(name) != asked[name]]
    if other:
        raise CheckpointError(
            f"{path.parent} holds a run with {other[0]} = {begun.get(other[0])}, and "
            f"{asked[other[0]]} is asked for: ask for the same, or give another folder"
        )
