"""Outputs that are no logits: what a network has applied to its logits, by values and by graph."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.structure.graph import Node
from fusenorm_openood.structure.head import HALF

# The last four are the parameters of a Dirichlet distribution in evidential networks.
_UNDONE: tuple[Callable[[Tensor], Tensor], ...] = (
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
    return any(torch.allclose(y, undone(x), rtol=1e-2, atol=1e-5) for undone in _UNDONE)


def checked_activation(net: nn.Module, outputs: Tensor, activation: str) -> str:
    """What makes the outputs `[B, K]` of a network logits of another kind: `log_softmax`, or empty.

    Args:
        net: the network.
        outputs: its logits, as far as they could be found.
        activation: what they were made with by their graph; see `last_activation`.

    Raises:
        TapError: outputs that are no logits.
    """
    if _are_probabilities(outputs.exp()):
        return "log_softmax"
    activation = "softmax" if _are_probabilities(outputs) else activation
    one_sign = bool((outputs >= 0).all() or (outputs <= 0).all())
    if not one_sign or activation in ("", "log_softmax"):
        return activation if one_sign else ""
    said = "probabilities" if activation in ("softmax", "sigmoid") else f"values of {activation}"
    raise TapError(
        f"{type(net).__name__} returns {said}, which are no logits: wrap it so that its forward "
        f"returns what its {activation} is applied to, or with output='msp' log-probabilities"
    )


def _are_probabilities(outputs: Tensor) -> bool:
    total, rounding = outputs.float().sum(1), 1e-2 if outputs.dtype in HALF else 1e-3
    near = torch.allclose(total, torch.ones_like(total), atol=rounding)
    return bool((outputs >= 0).all()) and near


def last_activation(node: Node) -> str:
    """The activation that outputs were made with, by their graph: `sigmoid`, or empty if none.

    Sums and means of several, as of an ensemble, and multiples count as well.
    """
    waiting, seen, found = [] if node is None else [node], {node}, set[str]()
    while waiting:
        node = waiting.pop()
        if all(n is None or n.name().endswith("AccumulateGrad") for n, _ in node.next_functions):
            continue  # made of weights alone, such as a learned scale
        if match := _NONLINEAR.match(node.name()):
            found.add(match[1])
        elif _PASSED.match(node.name()):
            following = {n for n, _ in node.next_functions if n is not None} - seen
            waiting += following
            seen |= following
        else:
            return ""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", found.pop()).lower() if len(found) == 1 else ""
