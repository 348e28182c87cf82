"""What a kernel must not do: read memory that is not a map's, or hide what torch has to see."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def may_read(x: Tensor) -> bool:
    """Whether a kernel may compute from the memory of a tensor, unseen by torch.

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
    if x.data_ptr() == 0:
        return False
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return bool((last + 1) * x.element_size() <= storage.nbytes())


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory could not be allocated, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(said in text for said in ("out of memory", "allocate memory", "not enough memory"))
    )
