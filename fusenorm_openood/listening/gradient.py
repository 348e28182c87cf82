"""Gradients with respect to images, through a network that is left unchanged."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


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
