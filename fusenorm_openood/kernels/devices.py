"""Choose a device, and run code that was written for CUDA on it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.storage.torchrun import this_process


class _RedirectCuda(TorchFunctionMode):
    """Redirects `.cuda()` of tensors, and so of modules, to another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            kwargs.pop("device", None)
            return args[0].to(self.device, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def on_device(device: str | torch.device) -> Iterator[None]:
    """Context in which `.cuda()` moves any tensor or module to `device`, in this thread alone.

    OpenOOD moves everything to CUDA; so its evaluators, pipelines and trainers run elsewhere, too.

    Examples:
        >>> with on_device("cpu"):
        ...     torch.ones(2).cuda().device
        device(type='cpu')
    """
    device = torch.device(device)
    with nullcontext() if device == torch.device("cuda") else _RedirectCuda(device):
        yield


def find_device(name: str) -> torch.device:
    """The device of that name, `auto` = the best one available; ConfigError if it is unusable."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, dtype=torch.float32, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}): choose auto or cpu"
        ) from None
    return torch.device(name)


def own_device(name: str) -> torch.device:
    """As `find_device`; each process of `torchrun` has a GPU of its own, if there are enough."""
    device, process = find_device(name), this_process()
    if process.world == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", process.local_rank % torch.cuda.device_count())


def device_of(net: nn.Module) -> torch.device:
    """The device of a network's first parameter; the CPU for a network without parameters."""
    parameter = next(net.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def moved(net: nn.Module, images: Tensor) -> Tensor:
    """Images on a network's device, and in the precision of its weights."""
    weights = (p.dtype for p in net.parameters() if p.is_floating_point())
    return images.to(device_of(net), next(weights, images.dtype), non_blocking=True)


def with_double(values: Tensor) -> Tensor:
    """The tensor on a device that has float64: on the CPU if it was on Apple's MPS."""
    return values.cpu() if values.device.type == "mps" else values


def casts_down(device: torch.device) -> bool:
    """Whether autocast is on for a device; some devices do not have it."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context without autocast."""
    return torch.autocast(device.type, enabled=False) if casts_down(device) else nullcontext()


def on_cpu() -> AbstractContextManager[Any]:
    """Context in which torch makes tensors on the CPU, in spite of `torch.set_default_device`."""
    device = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == device else device
