"""One recorded forward pass: what each module was given and what it returned."""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusenorm_openood.network.graph import Node
from fusenorm_openood.network.outputs import tensors_in
from fusenorm_openood.network.running import hooked

INPUT = ":input"  # after the name of a module: the first tensor that it is given


class Value(NamedTuple):
    """A tensor in a pass over two images."""

    node: Node  # in the graph; None without one
    shape: tuple[int, ...]
    alike: Tensor | None  # of [B, N, C] or [N, B, C], which tokens are equal for both images

    @classmethod
    def of(cls, x: Tensor) -> "Value":
        alike = None
        if x.ndim == 3 and 2 in x.shape[:2]:
            one, other = x.unbind(0) if x.shape[0] == 2 else x.unbind(1)
            alike = (one == other).all(-1)
        return cls(x.grad_fn, tuple(x.shape), alike)


@dataclass
class Call:
    """What a module did in a pass; of several runs, in the last one."""

    runs: int = 0
    entered: tuple[Node, ...] = ()  # nodes of the tensors that it was given
    earlier: tuple[Node, ...] = ()  # nodes of the first tensors that it returned in earlier runs
    took: Value | None = None  # the first tensor that it was given
    gave: tuple[Value, ...] = ()  # the tensors that it returned
    index: int = 0  # which of them is its feature map
    is_alone: bool = True  # it returned one tensor, in nothing else

    @property
    def left(self) -> Node:
        """Graph node of the feature map, None without a graph."""
        return self.gave[self.index].node if self.gave else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the feature map."""
        return self.gave[self.index].shape if self.gave else ()

    def choose(self, trunk: Collection[Node]) -> None:
        """Take the first returned tensor on the trunk for the feature map, if there is one."""
        new = (i for i, v in enumerate(self.gave) if v.node in trunk and v.node not in self.entered)
        self.index = next(new, 0)


class WithGraph(TorchFunctionMode):
    """Context in which a network's own `no_grad`, `inference_mode` and `detach` have no effect.

    Frozen backbones run without gradients, and gates are detached. Blocks are read from the graph,
    so for the pass that is read, and for it alone, there must be one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not args[0]:
            return None
        if func in _DETACHING and args[0].grad_fn is not None:
            return args[0]
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return func(*args, **(kwargs or {}))


_DATA: Any = Tensor.data
_DETACHING = (Tensor.detach, Tensor.detach_, torch.detach, _DATA.__get__)


def recorded(net: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Call]]:
    """What `run` returns, and the calls of the modules in the order in which they ended."""
    # What is scripted takes no hooks, and is a part of the module around it.
    names = {m: n for n, m in net.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    calls: dict[str, Call] = {}
    begun: dict[str, tuple[tuple[Node, ...], Value | None]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [tensor for _, tensor in tensors_in((args, kwargs))]
        nodes = tuple(dict.fromkeys(t.grad_fn for t in given if t.requires_grad))
        begun[names[module]] = nodes, Value.of(given[0]) if given else None

    def after(module: nn.Module, args: Any, output: Any) -> None:
        call = calls.pop(names[module], Call())
        call.runs += 1
        call.earlier = (*call.earlier, call.left) if call.left is not None else ()
        call.entered, call.took = begun.get(names[module], ((), None))
        call.gave = tuple(Value.of(tensor) for _, tensor in tensors_in(output)) or call.gave
        call.is_alone = isinstance(output, Tensor)
        calls[names[module]] = call

    with hooked(before=[(m, before) for m in names], after=[(m, after) for m in names]):
        return run(), calls
