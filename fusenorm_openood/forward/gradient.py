"""Gradients with respect to images, through a network that is left unchanged."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from fusenorm_openood.errors import TapError, is_out_of_memory

T = TypeVar("T")
# Networks that compute parts of their graph anew in the backward pass, which no mode reaches.
_recomputing: WeakSet[nn.Module] = WeakSet()


def gradients_of_images(net: nn.Module, images: Tensor, differentiate: Callable[[Tensor], T]) -> T:
    """What a function computes from images `[B, C, H, W]` that require a gradient.

    TapError if none reaches them.
    """

    def attempt(saving: Any) -> T:
        with torch.inference_mode(False), torch.enable_grad(), saving:
            return differentiate(images.detach().clone().requires_grad_())

    try:
        if net not in _recomputing:
            try:
                return attempt(ConstantBatchNorm())
            except CheckpointError:
                _recomputing.add(net)
        return attempt(nullcontext())
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        with torch.no_grad():
            net(images.clone())  # raises the network's own error, if it is one
        why = str(error).strip().splitlines()[0]
        raise TapError(
            f"ODIN needs the gradient of the logits of {type(net).__name__} with respect to its "
            f"images, and none reaches them ({why}): choose output='energy'"
        ) from error


class ConstantBatchNorm(TorchFunctionMode):
    """Context in which batch norm in evaluation mode saves no feature map for the backward pass.

    In evaluation mode batch norm is an affine map with constant coefficients, and its gradient
    needs only their product. Autograd saves the input as well, which takes up half of the memory
    of a ResNet's graph. The outputs are bitwise the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and args[0].requires_grad and not kwargs["training"]:
            x, mean, var = args
            return _BatchNorm.apply(x, mean, var, kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return func(*args, **kwargs)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(scale if weight is None else scale * weight)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        (gradient,) = gradients
        shape = (1, -1, *[1] * (gradient.ndim - 2))
        return (gradient * scale.view(shape)).to(gradient.dtype), None, None, None, None, None
