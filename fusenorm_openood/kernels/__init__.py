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
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fusenorm_openood.errors import ConfigError, TapError, is_out_of_memory

Settings = Sequence[tuple[float, float, float, float]]  # k_min, k_max, alpha, eps
Norms = Callable[[Tensor, Settings], Tensor]

VARIABLE = "FUSENORM_KERNEL"
TRIED: Settings = [(0.1, 0.25, 0.0, 1e-8), (0.29, 0.29, 0.5, 1e-4)]  # 29 of 100 pixels, by float32
RTOL = 1e-4  # a wrong k changes a norm of these maps by more, rounding by far less

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
    device: str  # which is the name of the module, too
    most_pixels: int
    install: str


_COMPILED = {  # by the name of their package
    "numba": _Compiled("cpu", 2**24, "pip install 'fusenorm-openood[fast]'"),  # float32
    "triton": _Compiled("cuda", 2**14, "install torch's CUDA build, which includes it"),
}
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
    return _backend(torch.device(device).type, os.environ.get(VARIABLE, ""), *_failed)


@cache
def _backend(kind: str, forced: str, *failed: str) -> Backend:
    if forced == "torch":
        return Backend("torch", f"{VARIABLE} forces it")
    if forced and forced not in _COMPILED:
        raise ConfigError(
            f"{VARIABLE}={forced} is unknown: set it to torch, {', '.join(_COMPILED)}, or unset it"
        )
    name = forced or next((n for n, c in _COMPILED.items() if c.device == kind), "")
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not name or not (_COMPILED[name].device == kind or interpreted):
        why_not = f"there is no {f'{name} ' if name else ''}kernel for {kind}"
    elif name in failed:
        why_not = f"{name} failed: {_failed[name]}"
    elif find_spec(name) is None:
        why_not = f"{name} is not installed: {_COMPILED[name].install}"
    else:
        return Backend(name, f"{VARIABLE} forces it" if forced else f"{name} is installed")
    if forced:
        raise _not_available(forced, why_not)
    return Backend("torch", why_not)


def norms(x: Tensor, settings: Settings, by_torch: Norms) -> Tensor:
    """Norms ``[B, S]`` of feature maps ``[B, C, H, W]``, by a kernel where one can; see `atf`.

    ``settings`` are ``(k_min, k_max, alpha, eps)``, and have been checked. They share the energies,
    and those with the same ``eps`` the entropies, too. ``by_torch`` computes with torch what no
    kernel supports, and what a kernel is compared with at its first use. A kernel that differs or
    fails is reported by one warning and not used again in this process; if it was forced, that is a
    ConfigError. Running out of memory is neither: the error is raised, the kernel stays.
    """
    if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise TapError(
            "atf takes floating-point feature maps [B, C, H, W] with at least one pixel, got "
            f"{x.dtype} of shape {list(x.shape)}: tap a module that returns such maps"
        )
    maps, found = x.flatten(2), None
    if not torch.compiler.is_compiling():
        name = _backend(x.device.type, os.environ.get(VARIABLE, ""), *_failed).name
        is_supported = name != "torch" and (
            x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and x.shape[0] > 0
            and 1 < maps.shape[-1] <= _COMPILED[name].most_pixels
        )
        for *_, eps in settings:  # to the last digits that float32 has
            is_supported = is_supported and 1e-30 <= eps <= 1e30
        if is_supported and may_read(maps):
            try:
                kernel = _kernel(name, x.device, by_torch)
                if "torch._dynamo" in sys.modules:  # it would trace a kernel without memory to read
                    kernel = _untraced(kernel)
                found = kernel(maps, settings)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                _give_up(name, error)
    found = by_torch(maps, settings) if found is None else found
    return found.T.to(x.dtype if x.dtype == torch.float64 else torch.float32).to(x.device)


def _give_up(name: str, error: Exception) -> None:
    """Use a kernel no more that has failed; ConfigError if it was forced."""
    why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if os.environ.get(VARIABLE):
        raise _not_available(name, why) from error
    _failed[name] = why
    warnings.warn(
        f"the {name} kernel failed, so torch computes the feature norms, more slowly ({why})",
        RuntimeWarning,
        stacklevel=3,
    )


@cache
def _kernel(name: str, device: torch.device, by_torch: Norms) -> Norms:
    """A kernel, compiled, after it has agreed with torch on small maps."""
    module = import_module(f"{__name__}.{_COMPILED[name].device}")
    kernel: Norms = module.norms
    compare(kernel, by_torch, module.TRIALS, device)
    return kernel


_untraced = cache(torch.compiler.disable)


def _not_available(forced: str, why: str) -> ConfigError:
    return ConfigError(
        f"{VARIABLE}={forced} is not available ({why}): set it to torch, or unset it"
    )


def may_read(x: Tensor) -> bool:
    """Whether a kernel may compute from the memory of a tensor, without torch.

    Not where torch differentiates, traces or transforms the computation, or intercepts it by a
    dispatch mode, for then a kernel's result would be taken for a constant; nor where the numbers
    are not in memory: fake tensors, other subclasses, tensors that ``torch.func`` has wrapped.
    """
    if (
        type(x) is not Tensor
        or x.layout != torch.strided
        or (x.requires_grad and torch.is_grad_enabled())
        or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or _get_current_dispatch_mode() is not None
    ):
        return False
    try:
        storage = x.untyped_storage()
    except RuntimeError:  # wrapped by torch.func
        return False
    last = x.storage_offset()
    for count, stride in zip(x.shape, x.stride(), strict=True):
        last += (count - 1) * stride
    return x.data_ptr() != 0 and bool((last + 1) * x.element_size() <= storage.nbytes())


def compare(
    kernel: Norms, by_torch: Norms, shapes: Sequence[tuple[int, int]], device: torch.device
) -> None:
    """Raise ArithmeticError unless a kernel agrees with torch on maps ``[2, C, N]`` of each shape.

    In every precision that kernels support, contiguous and channels_last.
    """
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for C, N in shapes:
            maps = trial_maps(C, N).to(dtype)
            expected = by_torch(maps, TRIED)
            for layout, x in (("contiguous", maps), ("channels_last", maps.mT.contiguous().mT)):
                # Samples one by one keep to one thread, which is fast on a busy machine, too.
                samples = torch.split(x.to(device), 1)
                found = torch.cat([kernel(sample, TRIED) for sample in samples], dim=1).cpu()
                if not torch.allclose(found, expected, rtol=RTOL, atol=0):
                    worst = ((found - expected) / expected).abs().max().item()
                    raise ArithmeticError(
                        f"differs from torch by {worst:.1e} on {layout} {dtype} maps {[2, C, N]}"
                    )


def trial_maps(C: int, N: int) -> Tensor:
    """Two maps ``[C, N]`` of no pattern: one of both signs, one without a sign.

    The last channel is dead and the first all but constant, where C has room for them.
    """
    x = torch.arange(2 * C * N, dtype=torch.float64, device="cpu").square().sin().view(2, C, N)
    if C > 2:
        x[:, 0] = 0.7 + 1e-3 * x[:, 0]
        x[:, -1] = 0
    x[1] = x[1].relu()
    return x.float()
