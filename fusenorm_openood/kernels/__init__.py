"""Compiled kernels of ATF: which ones exist, which one is used, and what happens if one fails."""

import os
import sys
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.kernels.guards import Norms, Settings, compare, is_out_of_memory, may_read

VARIABLE = "FUSENORM_KERNEL"

# log(1 + r) = r - r^2/2 + r^3 (c0 + c1 r + ... + c6 r^6) for sqrt(1/2) <= 1 + r <= sqrt(2), with
# relative errors below 2e-7: numpy's Chebyshev fit, of which both kernels compute entropies.
LOG1P = (
    0.3333340883255005, -0.2500092089176178, 0.19985127449035645, -0.16592855751514435,
    0.14676396548748016, -0.1411842554807663, 0.09272214025259018,
)  # fmt: skip


class Backend(NamedTuple):
    """What computes ATF on a device (``torch``, ``numba`` or ``triton``), and why."""

    name: str
    reason: str


class _Compiled(NamedTuple):
    module: str
    device: str
    most_pixels: int
    install: str


_COMPILED = {  # by the name of their package
    "numba": _Compiled("cpu", "cpu", 2**24, "pip install 'fusenorm-openood[fast]'"),  # float32
    "triton": _Compiled("cuda", "cuda", 2**14, "install torch's CUDA build, which includes it"),
}
_BY_DEVICE = {compiled.device: name for name, compiled in _COMPILED.items()}
_failed: dict[str, str] = {}
_found = cache(find_spec)


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
    kind, forced = torch.device(device).type, os.environ.get(VARIABLE, "")
    if forced == "torch":
        return Backend("torch", f"{VARIABLE} forces it")
    if forced and forced not in _COMPILED:
        raise ConfigError(
            f"{VARIABLE}={forced} is unknown: set it to torch, {', '.join(_COMPILED)}, or unset it"
        )
    name = forced or _BY_DEVICE.get(kind, "")
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not name or not (_COMPILED[name].device == kind or interpreted):
        why_not = f"there is no {f'{name} ' if name else ''}kernel for {kind}"
    elif name in _failed:
        why_not = f"{name} failed: {_failed[name]}"
    elif _found(name) is None:
        why_not = f"{name} is not installed: {_COMPILED[name].install}"
    else:
        return Backend(name, f"{VARIABLE} forces it" if forced else f"{name} is installed")
    if forced:
        raise _not_available(forced, why_not)
    return Backend("torch", why_not)


def norms(x: Tensor, settings: Settings, by_torch: Norms) -> Tensor:
    """Norms ``[S, B]`` in float64 of feature maps ``[B, C, N]``, by a kernel where one can.

    ``settings`` are ``(k_min, k_max, alpha, eps)``. ``by_torch`` computes the same with torch: what
    no kernel supports, and what a kernel is compared with at its first use. A kernel that differs
    or fails is reported by one warning and not used again in this process; if it was forced, that
    is a ConfigError. Running out of memory is neither: the error is raised, the kernel stays.
    """
    if torch.compiler.is_compiling():
        return by_torch(x, settings)
    name = backend(x.device).name
    is_supported = name != "torch" and (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.shape[0] > 0
        and 1 < x.shape[-1] <= _COMPILED[name].most_pixels
    )
    for *_, eps in settings:  # to the last digits that float32 has
        is_supported = is_supported and 1e-30 <= eps <= 1e30
    if not (is_supported and may_read(x)):
        return by_torch(x, settings)
    try:
        kernel = _kernel(name, x.device, by_torch)
        return (_untraced(kernel) if "torch._dynamo" in sys.modules else kernel)(x, settings)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if os.environ.get(VARIABLE):
            raise _not_available(name, why) from error
    _failed[name] = why
    warnings.warn(
        f"the {name} kernel failed, so torch computes the feature norms, more slowly ({why})",
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


def _not_available(forced: str, why: str) -> ConfigError:
    return ConfigError(
        f"{VARIABLE}={forced} is not available ({why}): set it to torch, or unset it"
    )
