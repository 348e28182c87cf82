"""One recorded forward pass: what each module was given and what it returned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusenorm_openood.structure.graph import Node
from fusenorm_openood.structure.hooks import hooked
from fusenorm_openood.structure.outputs import tensors_in


@dataclass
class Call:
    """What a module did in a pass; of several runs, in the last one.

    Attributes:
        runs: how often it ran.
        entered: graph nodes of the tensors that it was given.
        left: graph node of the first tensor that it returned, None without a graph.
        earlier: these nodes of its earlier runs.
        given: shape of the first tensor that it was given.
        shape: shape of the first tensor that it returned.
    """

    runs: int = 0
    entered: tuple[Node, ...] = ()
    left: Node = None
    earlier: tuple[Node, ...] = ()
    given: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


def recorded(net: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Call]]:
    """What `run` returns, and the calls of the modules in the order in which they ended."""
    calls: dict[str, Call] = {}
    begun: dict[str, tuple[tuple[Node, ...], tuple[int, ...]]] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [tensor for _, tensor in tensors_in((args, kwargs))]
            nodes = tuple(dict.fromkeys(t.grad_fn for t in given if t.requires_grad))
            begun[name] = nodes, tuple(given[0].shape) if given else ()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = calls.pop(name, Call())
            _, first = next(tensors_in(output), ((), None))
            call.runs += 1
            call.earlier = (*call.earlier, call.left) if call.left is not None else ()
            call.entered, call.given = begun.get(name, ((), ()))
            if first is not None:
                call.left, call.shape = first.grad_fn, tuple(first.shape)
            calls[name] = call

        return hook

    # What is scripted takes no hooks, and is a part of the module around it.
    modules = {n: m for n, m in net.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    with hooked(
        before=[(module, before(name)) for name, module in modules.items()],
        after=[(module, after(name)) for name, module in modules.items()],
    ):
        return run(), calls
