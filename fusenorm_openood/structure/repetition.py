"""What passes over the same images differ in: chance, other images beside them, their number."""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusenorm_openood.devices import casts_down
from fusenorm_openood.errors import TapError
from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.structure.head import HALF

PASSES = 16  # over two images, of a network that draws random numbers: it may draw the same ones

# Of a pass: inputs and outputs of the head's layers, and logits [B, K].
Listened = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor]


class Repetition(NamedTuple):
    """What a network does with the same images again; see `Structure`."""

    random: bool
    mixes: bool
    smallest_batch: int


def repeated(run: Callable[[Tensor], Listened], images: Tensor) -> tuple[Listened, Repetition]:
    """What a pass over two images gives, and what other passes over them differ in.

    Args:
        run: a pass. The states of the random number generators are not restored after it.
        images: `[2, C, H, W]`.

    Raises:
        TapError: logits that are not one row per image.
    """
    before = _generators(images.device)
    first = run(images)
    draws = _generators(images.device) != before
    again = (run(images) for _ in range(PASSES if draws else 1))
    is_random = any(not _alike(other, first) for other in again)
    try:
        alone, smallest = run(images[:1]), 1
        if [x.ndim for x in _values(alone)] != [x.ndim for x in _values(first)]:
            raise ValueError("a batch of one image loses a dimension")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        try:
            alone, smallest = run(images[[0, 1, 0]]), 2
        except TapError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return first, Repetition(is_random, True, 1)
    mixes = not is_random and not _close(alone[2], first[2])
    return first, Repetition(is_random, mixes, 1 if mixes else smallest)


def _generators(device: torch.device) -> list[Any]:
    """The states of the random number generators of torch, NumPy and Python."""
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [*(state.tolist() for state in states), random.getstate(), str(np.random.get_state())]


def _values(listened: Listened) -> list[Tensor]:
    inputs, outputs, logits = listened
    values = (logits, *inputs.values(), *outputs.values())
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _alike(found: Listened, expected: Listened) -> bool:
    pairs = zip(_values(found), _values(expected), strict=False)
    return all(x.shape == y.shape and _close(x, y) for x, y in pairs)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether values of images, the first of which may come again, differ by rounding only."""
    x, y = found.float(), expected.float()
    y = y if len(x) == len(y) else torch.cat([y, y])[: len(x)]
    if not (x.isfinite().all() and y.isfinite().all()):
        return True
    is_half = expected.dtype in HALF or casts_down(expected.device)
    tolerance = (1e-2 if is_half else 1e-3) * float(expected.max() - expected.min())
    return torch.allclose(x, y, rtol=0, atol=tolerance + 1e-6)
