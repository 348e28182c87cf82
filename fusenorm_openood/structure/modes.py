"""Leave a network, torch's random numbers and torch.compile as they were, also under threads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn

_lock = RLock()
_modes: dict[nn.Module, tuple[bool, int]] = {}  # mode before the first of the passes; how many
_eager: list[Any] = []  # the stance of torch.compile during the passes, if it was ever used


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and restore the mode of every module afterwards.

    Where passes of several threads overlap, the modes are those before the first of them, and the
    last one restores them. Compiled modules run as they were before compilation, because what is
    compiled ignores hooks.
    """
    modules = list(net.modules())
    with _lock:
        for module in modules:
            mode, passes = _modes.get(module, (module.training, 0))
            _modes[module] = mode, passes + 1
        if "torch._dynamo" in sys.modules and not _eager and hasattr(torch.compiler, "set_stance"):
            _eager.append(torch.compiler.set_stance("force_eager"))
    try:
        net.eval()
        yield
    finally:
        with _lock:
            for module in modules:
                mode, passes = _modes.pop(module)
                if passes > 1:
                    _modes[module] = mode, passes - 1
                else:
                    module.training = mode
            if not _modes and _eager:
                _eager.pop().__exit__(None, None, None)


@contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Restore the state of the random number generators of the CPU and of a CUDA device."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def without_weight_gradients(net: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` on all weights while other code calls `backward()`.

    This package's own gradients do not need it: `torch.autograd.grad` differentiates with respect
    to the images only, and with `requires_grad` off, autocast would cast the weights in every pass.
    """
    required = [p for p in net.parameters() if p.requires_grad]
    try:
        net.requires_grad_(False)
        yield
    finally:
        for p in required:
            p.requires_grad_()
