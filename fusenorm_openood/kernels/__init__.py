"""Compiled versions of ATF: which there are, which one is used, and what if it fails."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fusenorm_openood.errors import ConfigError

VARIABLE = "FUSENORM_KERNEL"
Kernel = Callable[[Tensor, Sequence[tuple[float, float, float, float]]], Tensor]


class Backend(NamedTuple):
    """What computes ATF on a device: ``torch``, ``numba`` or ``triton``, and why that one."""

    name: str
    reason: str


class _Compiled(NamedTuple):
    module: str
    device: str
    package: str
    install: str


_COMPILED = {
    "numba": _Compiled("cpu", "cpu", "numba", "pip install 'fusenorm-openood[fast]'"),
    "triton": _Compiled("cuda", "cuda", "triton", "install torch's CUDA build, which brings it"),
}
_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_PIXELS = 2**14  # of the largest map that the kernel for CUDA holds in registers
_failed: dict[str, str] = {}


def backend(device: torch.device | str = "cpu") -> Backend:
    """The backend that computes ATF of feature maps on a device, and why it is that one.

    The environment variable ``FUSENORM_KERNEL`` forces one: ``torch``, ``numba`` or ``triton``.
    With any of them torch computes what a kernel does not: float64 maps, empty batches, maps of one
    pixel, of more than 2^14 on CUDA or 2^24 on a CPU, maps that ask for a gradient, and norms with
    an eps outside 1e-30 to 1e30.

    Raises:
        ConfigError: an unknown name in the variable, or a backend that the device lacks.
    """
    kind = torch.device(device).type
    forced = os.environ.get(VARIABLE, "")
    if forced == "torch":
        return Backend("torch", f"{VARIABLE} forces it")
    if forced and forced not in _COMPILED:
        raise ConfigError(
            f"{VARIABLE}={forced} unknown: set it to torch, {', '.join(_COMPILED)}, or not at all"
        )
    reasons = [f"there is no {forced}{' ' * bool(forced)}kernel for {kind}"]
    for name, compiled in _COMPILED.items():
        if forced not in ("", name) or not (compiled.device == kind or _interpreted(forced)):
            continue
        if name in _failed:
            reasons = [f"{name} failed: {_failed[name]}"]
        elif not _is_installed(compiled.package):
            reasons = [f"{name} is not installed: {compiled.install}"]
        else:
            why = f"{VARIABLE} forces it" if forced else f"{compiled.package} is installed"
            return Backend(name, why)
    if forced:
        raise _not_to_be_had(forced, reasons[0])
    return Backend("torch", reasons[0])


def norms(x: Tensor, settings: Sequence[tuple[float, float, float, float]]) -> Tensor | None:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]`` by a kernel, None without one.

    A kernel that fails is named in one warning and not asked again; forced, it is an error.
    ``settings`` are ``(k_min, k_max, alpha, eps)``.
    """
    chosen = backend(x.device).name
    if chosen == "torch" or not _suits(x, chosen, settings):
        return None
    try:
        return _kernel(chosen)(x, settings)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if os.environ.get(VARIABLE):
            raise _not_to_be_had(chosen, why) from error
        _failed[chosen] = why
        warnings.warn(
            f"the {chosen} kernel failed, so torch computes the feature norms, more slowly ({why})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@cache
def _kernel(name: str) -> Kernel:
    kernel: Kernel = import_module(f"{__name__}.{_COMPILED[name].module}").norms
    return kernel


def _suits(x: Tensor, chosen: str, settings: Sequence[tuple[float, float, float, float]]) -> bool:
    """Whether a kernel computes these maps to the last digits that float32 has."""
    N = x.shape[-1]
    return (
        x.dtype in _HALF_OR_SINGLE
        and len(x) > 0
        and 1 < N <= (_PIXELS if chosen == "triton" else 2**24)
        and all(1e-30 <= eps <= 1e30 for *_, eps in settings)
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def _not_to_be_had(forced: str, why: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}={forced} cannot be had ({why}): set it to torch, or not at all")


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _interpreted(forced: str) -> bool:
    """Whether Triton's interpreter stands in for a CUDA device."""
    return forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
