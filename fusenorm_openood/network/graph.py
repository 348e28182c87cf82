"""One recorded forward pass: the calls of its modules, and the autograd graph of its logits."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusenorm_openood.network.running import hooked, tensors_in

INPUT = ":input"  # after the name of a module: the first tensor that it is given
Node = Any  # torch.autograd.graph.Node; hashable by identity

# CopySlices is an addition in place to a part of a tensor.
_MERGES = re.compile(r"^(Add|Addcmul|Cat|Lerp|Stack|Sub)Backward|::CopySlices$")
_MULTIPLIES = re.compile(r"Convolution|Mm|mm|Linear|Attention|Bilinear|Mv|mv|Checkpoint|Einsum")
_CHANGES = re.compile(_MULTIPLIES.pattern + r"|Norm|Pool|Mean|Sum|Max|Upsample")  # a value's pixels


class Graph:
    """The part of an autograd graph that lies between logits and images.

    Its `trunk` are the nodes that every path from the logits to the images (a leaf) crosses, with
    their positions: 0 is nearest to the logits. It is empty if no path reaches the images. The
    value of a trunk node is all that later layers see of the image, so a residual block shows as a
    trunk node, where it begins, followed by branches that merge in the next trunk node.
    """

    def __init__(self, logits: Tensor, images: Tensor) -> None:
        self.root = logits.grad_fn
        self._take(_paths(self.root, images))

    def _take(self, children: dict[Node, list[Node]]) -> None:
        """Use a graph: the next nodes of each node, in an order in which these come first."""
        self.children, edges = children, Counter(n for node in children for n in children[node])
        # In topological order, a node is on every path if no edge leads from before to behind it:
        # `pending` counts the edges that have begun and not ended.
        pending, trunk = 0, list[Node]()
        for node in reversed(children):
            pending -= edges[node]
            if pending == 0:
                trunk.append(node)
            pending += len(children[node])
        self.trunk = {node: place for place, node in enumerate(trunk)}

    def along_deepest(self, merge: Node) -> "Graph | None":
        """The graph without the branches that leave the deepest branch of a merge on the way.

        None if these do a fifth of the work or more: they are trunks of their own.
        """
        depth = self._depths()
        deepest = max(self.children[merge], key=lambda node: depth[node])
        inside = self.before(deepest)
        work = [node in inside for node in self._fork(merge) if _multiplies(node)]
        if 5 * sum(work) <= 4 * len(work):
            return None
        graph = copy(self)
        graph.children = {**self.children, merge: [deepest]}
        left = graph.before(self.root)
        graph._take({node: n for node, n in graph.children.items() if node in left})
        return graph

    def _depths(self) -> dict[Node, int]:
        """How many convolutions and matrix products lie on the longest path to the images."""
        depth = dict[Node, int]()
        for node, following in self.children.items():  # what follows a node comes before it
            depth[node] = _multiplies(node) + max((depth[n] for n in following), default=0)
        return depth

    def has_parallel_trunks(self) -> bool:
        """Whether the branches of a fork do most of the work, and are no heads on one feature.

        The branches of heads have at most two products each, and no more than what is before them.
        """
        depth = self._depths()
        for fork in self.forks():
            branches = self._fork(fork)
            ends = (n for node in (fork, *branches) for n in self.children[node])
            before = max((depth[node] for node in ends if node in self.trunk), default=0)
            long = depth[fork] - _multiplies(fork) - before
            if self.share_of_work(branches) > 0.5 and long > min(before, 2):
                return True
        return False

    def before(self, start: Node) -> set[Node]:
        """A node, and the nodes on its paths to the images."""
        return reachable([start], lambda node: self.children[node])

    def forks(self) -> list[Node]:
        """Trunk nodes where branches with weights end, from the images to the logits."""
        return [node for node in reversed(self.trunk) if any(map(_multiplies, self._fork(node)))]

    def merges(self) -> list[Node]:
        """The forks that add or concatenate their branches."""
        return [node for node in self.forks() if _MERGES.search(node.name())]

    def share_of_work(self, nodes: Iterable[Node]) -> float:
        """The share of all convolutions and matrix products that are among nodes."""
        return sum(map(_multiplies, nodes)) / max(sum(map(_multiplies, self.children)), 1)

    def branches(self, merges: Iterable[Node]) -> set[Node]:
        """The nodes in the branches of merges."""
        return {node for merge in merges for node in self._fork(merge)}

    def _fork(self, merge: Node) -> set[Node]:
        """The nodes between a merge and the next trunk node."""

        def inside(node: Node) -> list[Node]:
            return [n for n in self.children[node] if n not in self.trunk]

        return reachable(inside(merge), inside)

    def ends_of(self, merge: Node) -> list[Node]:
        """The trunk nodes with the value of a merge, as it is or after an activation."""
        ends = [merge]
        for node in reversed(list(self.trunk)[: self.trunk[merge]]):
            if _CHANGES.search(node.name()) or len(self.children[node]) > 1:
                break
            ends.append(node)
        return ends

    def before_products(self) -> dict[Node, int]:
        """The trunk from where a matrix product lies between it and the logits, with positions."""
        for node, first in self.trunk.items():
            if _multiplies(node) or any(map(_multiplies, self._fork(node))):
                return {node: place for node, place in self.trunk.items() if place > first}
        return {}

    def first_on_every_path(self, wanted: Collection[Node]) -> list[Node]:
        """The first wanted node of each path from the logits; empty if some path has none."""
        found = reachable([self.root], lambda n: () if n in wanted else self.children[n])
        ends = [node for node in found if node in wanted or not self.children[node]]
        return ends if all(node in wanted for node in ends) else []


def reachable(start: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Some nodes, and those that are reached from them."""
    waiting = list(start)
    found = set(waiting)
    while waiting:
        new = set(following(waiting.pop())) - found
        waiting += new
        found |= new
    return found


def inputs_of(node: Node) -> list[Node]:
    """The nodes whose values a node is computed from."""
    return [n for n, _ in node.next_functions if n is not None]


def _paths(root: Node, images: Tensor) -> dict[Node, list[Node]]:
    """Of each node on a path from the root to the images, the next nodes on such paths.

    What follows a node comes before it.
    """
    nodes = set[Node]() if root is None else reachable([root], inputs_of)
    paths = dict[Node, list[Node]]()
    for node in TopologicalSorter({n: inputs_of(n) for n in nodes}).static_order():
        following = [n for n in inputs_of(node) if n in paths]
        if following or getattr(node, "variable", None) is images:
            paths[node] = following
    return paths


def _multiplies(node: Node) -> bool:
    return _MULTIPLIES.search(node.name()) is not None


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
