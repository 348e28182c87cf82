"""Restore the state of a network: its modes, and which weights require a gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
