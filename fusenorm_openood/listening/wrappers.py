"""What networks come wrapped in, and networks that score with other logits than they classify."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusenorm_openood.errors import TapError
from fusenorm_openood.listening.hooks import hooked
from fusenorm_openood.networks.t2fnorm import has_scoring_logits


def unwrapped(net: nn.Module) -> nn.Module:
    """The network in a wrapper of torch: DataParallel, DistributedDataParallel, torch.compile.

    It is what hooks can listen to, on one device.

    Raises:
        TapError: no network, or one that runs without its modules' hooks.
    """
    while True:
        if isinstance(net, nn.DataParallel | DistributedDataParallel):
            net = net.module
        elif isinstance(getattr(net, "_orig_mod", None), nn.Module):
            net = net._orig_mod  # type: ignore[assignment]
        else:
            break
    if not isinstance(net, nn.Module):
        raise TapError(f"net must be a torch.nn.Module, got {type(net).__name__}: wrap it in one")
    if isinstance(net, torch.jit.ScriptModule) or hasattr(net, "_guards_fn"):
        raise TapError(
            f"{type(net).__name__} is scripted, traced or exported, so its modules run no hooks: "
            "give the network that it was made from"
        )
    return net


def scoring_module(net: nn.Module) -> str | None:
    """Name of the module with separate scoring logits, `""` for the network itself, or None."""
    return next((name for name, m in net.named_modules() if has_scoring_logits(m)), None)


class _Reached(BaseException):  # no `except Exception` on its way stops it
    def __init__(self, args: Any, kwargs: Any) -> None:
        self.given = args, kwargs


def scoring_run(net: nn.Module, scoring: str | None) -> Callable[..., Any]:
    """What computes the outputs for OOD scores: the network, or its scoring module's method.

    What a network does before its scoring module still happens, what it does after it does not.
    """
    if not scoring:
        return net if scoring is None else net.forward_ood_inference  # type: ignore[return-value]
    module = net.get_submodule(scoring)

    def reached(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(args, kwargs)

    def run(images: Any) -> Any:
        try:
            with hooked(before=[(module, reached)]):
                net(images)
        except _Reached as found:
            args, kwargs = found.given
        else:
            raise TapError(f"{type(net).__name__} does not call its module {scoring!r}")
        return module.forward_ood_inference(*args, **kwargs)  # type: ignore[operator]

    return run
