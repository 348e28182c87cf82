"""What a kernel may compute, how it is tried before its first use, and which failures count."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

Settings = Sequence[tuple[float, float, float, float]]  # k_min, k_max, alpha, eps
Norms = Callable[[Tensor, Settings], Tensor]

TRIED: Settings = [(0.1, 0.25, 0.0, 1e-8), (0.29, 0.29, 0.5, 1e-4)]  # 29 of 100 pixels, by float32
RTOL = 1e-4  # a wrong k changes a norm of these maps by more, rounding by far less


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory could not be allocated, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(part in text for part in ("out of memory", "allocate memory", "not enough memory"))
    )
