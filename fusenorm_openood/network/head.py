"""The layers that make a network's logits: usually one, for some networks several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network.running import dequantised, hooked

HALF = (torch.float16, torch.bfloat16)


class HeadLayers(NamedTuple):
    """How logits come from the last layers with a weight matrix.

    Their feature is the input of these layers, or, if their weights do not give the logits, another
    tensor, of which `Structure.affine` does.
    """

    names: tuple[str, ...] = ()  # of the layers
    shares: tuple[float, ...] = ()  # factors of their outputs before these are added up
    is_linear: bool = False  # the logits are exactly this sum
    before_softmax: bool = False  # they are the layer's output; the network returns its softmax
    is_affine: bool = False  # of the feature, which may be a mean of what the layers are given
    feature: tuple[str, ...] = ()  # another feature: `output` or `input` of modules, their names
    is_normalised: bool = False  # this feature is divided by its length


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight matrix `[K, D]` of a linear layer or a convolution, also a quantised one."""
    weight = None if isinstance(module, nn.LayerNorm) else _parameter(module, "weight")
    if weight is None or weight.ndim < 2:
        return None
    plain: Tensor = weight.dequantize() if has_quantised_weight(module) else weight
    return plain.flatten(1)


def has_quantised_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is kept as integers and their scales, as torch and torchao do."""
    weight = _parameter(module, "weight")
    return weight is not None and (
        weight.is_quantized or type(weight).dequantize is not Tensor.dequantize
    )


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a layer, if it has it; in torch's quantised layers it is a method."""
    value: Any = getattr(module, name, None)
    value = value() if callable(value) else value
    return value.detach() if isinstance(value, Tensor) else None


def flat_feature(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as one feature per image `[B, D]`: a mean over pixels or tokens."""
    if x[0].numel() == max(x.shape[1:]):
        return x.flatten(1)
    if isinstance(module, nn.modules.conv._ConvNd):
        covers = tuple(module.kernel_size) == tuple(x.shape[2:])
        return x.flatten(1) if covers else x.flatten(2).mean(-1)
    if x.ndim == 4 and not (hasattr(module, "in_features") or isinstance(module, nn.LayerNorm)):
        return x.flatten(2).mean(-1)
    return x.flatten(1, -2).mean(1)


def feature_of(
    head: HeadLayers,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
) -> Tensor | None:
    """The penultimate feature `[B, D]`, `head.feature` or all layers' inputs side by side."""
    if head.feature:
        side, name, *_ = head.feature
        x = flat_feature(layers[name], (inputs if side == "input" else outputs)[name])
        return F.normalize(x) if head.is_normalised else x
    parts = [flat_feature(layers[name], inputs[name]) for name in head.names]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None


def linear_head(modules: Sequence[nn.Module], shares: Sequence[float]) -> Head | None:
    """Weight `[K, D]` and bias `[K]` of the logits as a function of `feature_of`."""
    weights, biases = list[Tensor](), list[Tensor]()
    for module, share in zip(modules, shares, strict=True):
        weight, bias = weight_of(module), _parameter(module, "bias")
        if weight is None or (weights and len(weight) != len(weights[0])):
            return None
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        weights.append(weight if share == 1 else weight * share)
        biases.append(bias if share == 1 else bias * share)
    if len(weights) == 1:
        return Head(weights[0], biases[0])
    return Head(torch.cat(weights, dim=1), torch.stack(biases).sum(0)) if weights else None


def head_layers(core: nn.Module, head: HeadLayers) -> dict[str, nn.Module]:
    """The modules that a head's layers and its feature are found at."""
    return {name: core.get_submodule(name) for name in (*head.names, *head.feature[1:2])}


@contextmanager
def hooked_head(
    head: Mapping[str, nn.Module], change: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs and outputs of the layers that make the logits, with inputs that are changed."""
    names = {module: name for name, module in head.items()}
    inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Any = args[0] if args else next(iter(kwargs.values()), None)
        changed = given if change is None else change(given)
        inputs[names[module]] = dequantised(changed)
        if change is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): changed}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs[names[module]] = dequantised(output)

    with hooked(before=[(m, before) for m in names], after=[(m, after) for m in names]):
        yield inputs, outputs
