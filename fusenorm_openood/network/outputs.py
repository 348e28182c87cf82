"""Find the logits in what a network returns, and recognise outputs that are no logits."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.network import head, running
from fusenorm_openood.network.graph import Node, inputs_of, reachable


def find_logits(net: nn.Module, output: Any, batch: int) -> running.Path:
    """Where logits `[B, K]` are in a network's output.

    The tensor under the key `logits`, the only tensor `[B, K]`, or of several the one that is
    computed from all others. A softmax or a sigmoid of another one does not count. Where there are
    none, a single logit `[B, 1]` or `[B]` likewise. TapError if there are none, or several that may
    be.
    """
    given = list(running.tensors_in(output))
    found = {p: t for p, t in given if _may_be_logits(t, batch)}
    found = found or {p: t for p, t in given if _is_one_logit(t, batch)}
    found = {p: t for p, t in found.items() if not any(is_activation(x, t) for x in found.values())}
    named = [path for path in found if path and path[-1] == "logits"]
    if len(named) == 1 or len(found) == 1:
        return (named or list(found))[0]
    if not found:
        raise _no_logits(net, output, batch)
    for path, tensor in found.items():
        others = [other for p, other in found.items() if p != path and other is not tensor]
        if tensor.grad_fn is not None:
            sources = reachable([tensor.grad_fn], inputs_of)
            if all(other.grad_fn is not None and other.grad_fn in sources for other in others):
                return path
    listed = ", ".join(f"{'.'.join(map(str, p))} {list(t.shape)}" for p, t in found.items())
    raise TapError(
        f"{type(net).__name__} returns several tensors that may be logits ({listed}): wrap it so "
        "that its forward returns logits [B, K] alone"
    )


def logits_at(net: nn.Module, output: Any, path: running.Path, batch: int) -> Tensor:
    """The logits `[B, K]` at a place in a network's output; see `find_logits`.

    A single logit z is that of two classes, with the logits 0 and z.
    """
    try:
        found = running.dequantised(value_at(output, path))
    except (AttributeError, IndexError, KeyError, TypeError):
        found = None
    if isinstance(found, Tensor) and _may_be_logits(found, batch):
        return found
    if isinstance(found, Tensor) and _is_one_logit(found, batch):
        return of_two_classes(found.reshape(batch, 1))
    raise _no_logits(net, output if found is None else found, batch)


def of_two_classes(logits: Tensor) -> Tensor:
    """Logits `[B, K]`; of a single one z `[B, 1]`, those of two classes, 0 and z."""
    if logits.shape[1] > 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def value_at(output: Any, path: running.Path) -> Any:
    """What is at a place in a network's output."""
    for key in path:
        attribute = isinstance(key, str) and not isinstance(output, Mapping)
        output = getattr(output, key) if attribute else output[key]
    return output


def _no_logits(net: nn.Module, output: Any, batch: int) -> TapError:
    shapes = [list(tensor.shape) for _, tensor in running.tensors_in(output)]
    return TapError(
        f"{type(net).__name__} must return logits [B, K], or one logit [B, 1], got "
        f"{shapes[0] if shapes else type(output).__name__} for {batch} image(s): wrap it so that "
        "its forward returns them"
    )


def _may_be_logits(tensor: Tensor, batch: int) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] == batch and tensor.shape[1] >= 2


def _is_one_logit(tensor: Tensor, batch: int) -> bool:
    shapes = ((batch, 1), (batch,), ()) if batch == 1 else ((batch, 1), (batch,))
    return tuple(tensor.shape) in shapes


# The last four are the parameters of a Dirichlet distribution in evidential networks.
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.softmax(1),
    lambda x: x.log_softmax(1),
    torch.sigmoid,
    F.logsigmoid,
    F.softplus,
    torch.exp,
    lambda x: F.softplus(x) + 1,
    lambda x: x.exp() + 1,
    lambda x: x.relu() + 1,
    lambda x: F.elu(x) + 1,
)
_NONLINEAR = re.compile(r"^(LogSoftmax|Softmax|LogSigmoid|Sigmoid|Softplus|Exp)Backward")
# Operations that give values of the same kind: sums, means, multiples, parts, other shapes.
_PASSED = re.compile(
    r"^(Add|Sub|Rsub|Neg|Mul|Div|Reciprocal|Clamp|ClampMin|ClampMax|Mean|Sum|Stack|Cat|View"
    r"|UnsafeView|Reshape\w*|Squeeze|Unsqueeze|Select|Slice|Index|Split|Unbind|Expand|Permute"
    r"|Transpose|T|Clone|Alias|ToCopy)Backward"
)


def is_activation(before: Tensor, after: Tensor) -> bool:
    """Whether one tensor `[B, K]`, or `[B]`, is a softmax, a sigmoid or the like of another one."""
    x, y = (t.detach().float().reshape(len(t), -1) for t in (before, after))
    if x.shape != y.shape or torch.equal(x, y):
        return False
    return any(torch.allclose(y, of(x), rtol=1e-2, atol=1e-5) for of in _ACTIVATIONS)


def checked_activation(net: nn.Module, outputs: Tensor, activation: str) -> str:
    """`log_softmax` if what count as logits `[B, K]` are log-probabilities, else empty.

    `activation` is what they were made with by their graph; see `last_activation`. TapError if they
    are no logits.
    """
    if _are_probabilities(outputs.exp()):
        return "log_softmax"
    activation = "softmax" if _are_probabilities(outputs) else activation
    one_sign = bool((outputs >= 0).all() or (outputs <= 0).all())
    if not one_sign or activation in ("", "log_softmax"):
        return activation if one_sign else ""
    kind = "probabilities" if activation in ("softmax", "sigmoid") else f"values of {activation}"
    raise TapError(
        f"{type(net).__name__} returns {kind}, which are no logits: wrap it so that its forward "
        f"returns what its {activation} is applied to, or with output='msp' log-probabilities"
    )


def _are_probabilities(outputs: Tensor) -> bool:
    total, rounding = outputs.float().sum(1), 1e-2 if outputs.dtype in head.HALF else 1e-3
    near = torch.allclose(total, torch.ones_like(total), atol=rounding)
    return bool((outputs >= 0).all()) and near


def last_activation(node: Node) -> str:
    """The activation that outputs were made with, by their graph: `sigmoid`, or empty if none.

    Sums and means of several, as of an ensemble, and multiples count as well.
    """

    def is_of_weights(node: Node) -> bool:  # alone, such as a learned scale
        return all(n.name().endswith("AccumulateGrad") for n in inputs_of(node))

    def following(node: Node) -> list[Node]:
        return inputs_of(node) if _PASSED.match(node.name()) and not is_of_weights(node) else []

    nodes = reachable([] if node is None else [node], following)
    ends = [n.name() for n in nodes if not _PASSED.match(n.name()) and not is_of_weights(n)]
    found = {match and match[1] for match in map(_NONLINEAR.match, ends)}
    name = found.pop() if len(found) == 1 else None
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() if name else ""
