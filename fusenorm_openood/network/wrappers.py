"""What networks come wrapped in, and networks that score with other logits than they classify."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fusenorm_openood.errors import FuseNormError, NetworkError, TapError, is_lost_loader
from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.network.named import LazyNetwork
from fusenorm_openood.network.resnet import has_scoring_logits
from fusenorm_openood.network.running import hooked


def unwrapped(net: nn.Module) -> nn.Module:
    """The network in a wrapper of torch: DataParallel, DistributedDataParallel, torch.compile.

    It is what hooks can listen to, on one device.

    Raises:
        TapError: no network, or one that runs without its modules' hooks.
    """
    while True:
        if isinstance(net, nn.DataParallel | DistributedDataParallel):
            net = net.module
        elif isinstance(net, LazyNetwork):
            net = net.core
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
    """Name of the module with separate scoring logits, `""` for the network itself, or None.

    A network about which this is known is not loaded.
    """
    if isinstance(net, LazyNetwork) and net.known is not None:
        known: str | None = net.known.structure.scoring
        return known
    modules = unwrapped(net).named_modules()
    return next((name for name, module in modules if has_scoring_logits(module)), None)


@contextmanager
def network_errors(net: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn what a network raises on images into a NetworkError that shows their shape.

    Errors of this package, of loader processes and a lack of memory are passed on.
    """
    try:
        yield
    except FuseNormError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_lost_loader(error):
            raise
        why = (str(error).strip().splitlines() or [""])[0]
        raise NetworkError(
            f"{type(unwrapped(net)).__name__} fails on images {list(images.shape)} of "
            f"{images.dtype} ({type(error).__name__}: {why}): give it images as it takes them"
        ) from error


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
