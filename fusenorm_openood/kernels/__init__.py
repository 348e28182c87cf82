"""Compiled kernels of ATF: which ones exist, which one is used, and what happens if one fails."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.kernels.guards import compare, is_out_of_memory, may_read

VARIABLE = "FUSENORM_KERNEL"
Norms = Callable[[Tensor, Sequence[tuple[float, float, float, float]]], Tensor]


class Backend(NamedTuple):
    """What computes ATF on a device (``torch``, ``numba`` or ``triton``), and why."""

    name: str
    reason: str


class _Compiled(NamedTuple):
    module: str
    device: str
    package: str
    install: str


_COMPILED = {
    "numba": _Compiled("cpu", "cpu", "numba", "pip install 'fusenorm-openood[fast]'"),
    "triton": _Compiled("cuda", "cuda", "triton", "install torch's CUDA build, which includes it"),
}
_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_MOST_PIXELS = {"numba": 2**24, "triton": 2**14}  # exact in float32; fit in registers
_failed: dict[str, str] = {}


def backend(device: torch.device | str = "cpu") -> Backend:
    """The backend that computes ATF of feature maps on a device, and the reason for it.

    The environment variable ``FUSENORM_KERNEL`` forces one: ``torch``, ``numba`` or ``triton``.
    Whichever it is, torch computes what a kernel does not support: float64 maps, empty batches,
    maps of one pixel or of more than 2^14 (CUDA) or 2^24 (CPU), an eps outside 1e-30 to 1e30, maps
    whose gradient is needed, and tensors whose memory a kernel cannot read or whose computation
    torch is recording (``torch.func``, ``torch.compile``, ``torch.export``, fake tensors).

    Raises:
        ConfigError: the variable has an unknown value, or names a backend that is not available.
    """
    kind = torch.device(device).type
    forced = os.environ.get(VARIABLE, "")
    if forced == "torch":
        return Backend("torch", f"{VARIABLE} forces it")
    if forced and forced not in _COMPILED:
        raise ConfigError(
            f"{VARIABLE}={forced} is unknown: set it to torch, {', '.join(_COMPILED)}, or unset it"
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
        raise _not_available(forced, reasons[0])
    return Backend("torch", reasons[0])


def norms(
    x: Tensor, settings: Sequence[tuple[float, float, float, float]], by_torch: Norms
) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]``, by a kernel where one can.

    ``settings`` are ``(k_min, k_max, alpha, eps)``. ``by_torch`` computes the same with torch: what
    no kernel supports, and what a kernel is compared with at its first use. A kernel that differs
    or fails is reported by one warning and not used again in this process; if it was forced, that
    is a ConfigError. Running out of memory is neither: the error is raised, the kernel stays.
    """
    if torch.compiler.is_compiling():
        return by_torch(x, settings)
    chosen = backend(x.device).name
    if chosen == "torch" or not (_supports(chosen, x, settings) and may_read(x)):
        return by_torch(x, settings)
    try:
        kernel = _kernel(chosen, x.device, by_torch)
        return (_untraced(kernel) if "torch._dynamo" in sys.modules else kernel)(x, settings)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if os.environ.get(VARIABLE):
            raise _not_available(chosen, why) from error
        _failed[chosen] = why
        warnings.warn(
            f"the {chosen} kernel failed, so torch computes the feature norms, more slowly ({why})",
            RuntimeWarning,
            stacklevel=2,
        )
        return by_torch(x, settings)


@cache
def _kernel(name: str, device: torch.device, by_torch: Norms) -> Norms:
    """A kernel, compiled, after it has agreed with torch on small maps."""
    module = import_module(f"{__name__}.{_COMPILED[name].module}")
    kernel: Norms = module.norms
    compare(kernel, by_torch, module.TRIALS, device)
    return kernel


@cache
def _untraced(kernel: Norms) -> Norms:
    """A kernel that torch.compile never traces: it would be given tensors without memory."""
    disabled: Norms = torch.compiler.disable(kernel)  # type: ignore[no-untyped-call]
    return disabled


def _supports(name: str, x: Tensor, settings: Sequence[tuple[float, float, float, float]]) -> bool:
    """Whether a kernel computes these maps to the last digits that float32 has."""
    return (
        x.dtype in _HALF_OR_SINGLE
        and x.shape[0] > 0
        and 1 < x.shape[-1] <= _MOST_PIXELS[name]
        and all(1e-30 <= eps <= 1e30 for *_, eps in settings)
    )


def _not_available(forced: str, why: str) -> ConfigError:
    return ConfigError(
        f"{VARIABLE}={forced} is not available ({why}): set it to torch, or unset it"
    )


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _interpreted(forced: str) -> bool:
    """Whether Triton's interpreter stands in for a CUDA device."""
    return forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
