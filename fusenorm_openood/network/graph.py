"""The autograd graph of one forward pass: its trunk, its merges, what its logits come from."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node; hashable by identity

# CopySlices is an addition in place to a part of a tensor.
_MERGES = re.compile(r"^(Add|Addcmul|Cat|Lerp|Stack|Sub)Backward|::CopySlices$")
_MULTIPLIES = re.compile(r"Convolution|Mm|mm|Linear|Attention|Bilinear|Mv|mv|Checkpoint|Einsum")

_CHANGES = re.compile(_MULTIPLIES.pattern + r"|Norm|Pool|Mean|Sum|Max|Upsample")  # a value's pixels


class Graph:
    """The part of an autograd graph that lies between logits and images.

    Args:
        logits: logits `[B, K]` with a graph.
        images: the leaf that they are computed from.

    Attributes:
        trunk: the nodes that every path from the logits to the images crosses, with their
            positions: 0 is nearest to the logits. Empty if no path reaches the images.
    """

    def __init__(self, logits: Tensor, images: Tensor) -> None:
        self.root = logits.grad_fn
        self._take(_paths(self.root, images))

    def _take(self, children: dict[Node, list[Node]]) -> None:
        self.children = children
        self.trunk = {node: place for place, node in enumerate(_trunk(self.root, children))}

    def along_deepest(self, merge: Node) -> "Graph | None":
        """The graph without the branches that leave the deepest branch of a merge on the way.

        None if these do a fifth of the work or more: they are trunks of their own.
        """
        depth = dict[Node, int]()
        for node, following in self.children.items():  # what follows a node comes before it
            depth[node] = _multiplies(node) + max((depth[n] for n in following), default=0)
        deepest = max(self.children[merge], key=lambda node: depth[node])
        inside = self.before(deepest)
        work = [node in inside for node in self._fork(merge) if _multiplies(node)]
        if 5 * sum(work) <= 4 * len(work):
            return None
        graph = copy(self)
        graph.children = {**self.children, merge: [deepest]}
        kept = graph.before(self.root)
        graph._take({node: n for node, n in graph.children.items() if node in kept})
        return graph

    def before(self, start: Node) -> set[Node]:
        """A node, and the nodes on its paths to the images."""
        waiting, seen = [start], {start}
        while waiting:
            following = set(self.children[waiting.pop()]) - seen
            waiting += following
            seen |= following
        return seen

    def forks(self) -> list[Node]:
        """Trunk nodes where branches with a convolution or a matrix product end.

        From the images to the logits.
        """
        forks = [node for node in reversed(list(self.trunk)) if len(self.children[node]) > 1]
        return [node for node in forks if any(map(_multiplies, self._fork(node)))]

    def merges(self) -> list[Node]:
        """The forks that add or concatenate their branches."""
        return [node for node in self.forks() if _MERGES.search(node.name())]

    def share_of_largest_fork(self) -> float:
        """The largest share of all convolutions and matrix products between two trunk nodes."""
        forks = [self._fork(node) for node in self.trunk if len(self.children[node]) > 1]
        return max(map(self.share_of_work, forks), default=0.0)

    def ends_of(self, merge: Node) -> list[Node]:
        """The trunk nodes with the value of a merge, as it is or after an activation."""
        order, place = list(self.trunk), self.trunk[merge]
        ends = [merge]
        for node in reversed(order[:place]):
            if _CHANGES.search(node.name()) or len(self.children[node]) > 1:
                break
            ends.append(node)
        return ends

    def branches(self, merges: Iterable[Node]) -> set[Node]:
        """The nodes in the branches of merges."""
        return {node for merge in merges for node in self._fork(merge)}

    def share_of_work(self, nodes: Iterable[Node]) -> float:
        """The share of all convolutions and matrix products that are among nodes."""
        return sum(map(_multiplies, nodes)) / max(sum(map(_multiplies, self.children)), 1)

    def _fork(self, merge: Node) -> Iterable[Node]:
        """The nodes between a merge and the next trunk node."""
        waiting, seen = list(self.children[merge]), set[Node]()
        while waiting:
            node = waiting.pop()
            if node not in seen and node not in self.trunk:
                seen.add(node)
                waiting += self.children[node]
        return seen

    def before_products(self) -> dict[Node, int]:
        """The trunk from where a matrix product lies between it and the logits, with positions."""
        order, crossed = list(self.trunk), False
        for place, node in enumerate(order):
            if crossed:
                return {later: at for at, later in enumerate(order[place:], start=place)}
            crossed = _multiplies(node) or any(map(_multiplies, self._fork(node)))
        return {}

    def first_on_every_path(self, wanted: Callable[[Node], bool]) -> list[Node]:
        """The first wanted node of each path from the logits; empty if some path has none."""
        waiting, seen, found = [self.root], set[Node](), list[Node]()
        while waiting:
            node = waiting.pop()
            if node in seen or node not in self.children:
                continue
            seen.add(node)
            if wanted(node):
                found.append(node)
            elif not self.children[node]:
                return []
            waiting += [] if wanted(node) else self.children[node]
        return found


def _multiplies(node: Node) -> bool:
    return _MULTIPLIES.search(node.name()) is not None


def _paths(root: Node, images: Tensor) -> dict[Node, list[Node]]:
    """Of each node on a path from the root to the images, the next nodes on such paths."""
    kept: dict[Node, list[Node]] = {}
    state: dict[Node, bool] = {}  # whether all that follows a node has been seen
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting[-1]
        if node not in state:
            state[node] = False
            waiting += [n for n, _ in node.next_functions if n is not None and n not in state]
            continue
        waiting.pop()
        if state[node]:
            continue
        state[node] = True
        following = [n for n, _ in node.next_functions if n in kept]
        if following or getattr(node, "variable", None) is images:
            kept[node] = following
    return kept


def _trunk(root: Node, children: dict[Node, list[Node]]) -> list[Node]:
    """The nodes in which all pending edges of a walk in topological order end."""
    if root not in children:
        return []
    edges = Counter(child for following in children.values() for child in following)
    waited_for, trunk, ready, pending = Counter(edges), list[Node](), [root], 0
    while ready:
        node = ready.pop()
        pending -= edges[node]
        if pending == 0:
            trunk.append(node)
        for child in children[node]:
            pending += 1
            waited_for[child] -= 1
            if waited_for[child] == 0:
                ready.append(child)
    return trunk


def nodes_before(node: Node) -> set[Node]:
    """All nodes that a node's value is computed from."""
    waiting, seen = [node], set[Node]()
    while waiting:
        following = {n for n, _ in waiting.pop().next_functions if n is not None} - seen
        waiting += following
        seen |= following
    return seen
