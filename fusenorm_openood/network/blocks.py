"""Find the blocks of a network: the modules that end in a residual addition or a concatenation."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from fusenorm_openood.network.graph import Graph, Node
from fusenorm_openood.network.recording import Call

# BasicBlock, Bottleneck, PreActBlock, InvertedResidual, ...
_BLOCK = re.compile(r"(Block|Bottleneck|Residual)$")
_LEFT_OUT = 0.1  # share of the work in branches that no block holds, above which it is told
_MOST_MERGES = 3  # that one block adds in its own forward; more are a sequence of blocks


class Found(NamedTuple):
    """The blocks of a network.

    Attributes:
        names: their names in the order in which they run; that of a module followed by `:input`
            where no module returns a block's output, and this one is given it.
        rule: how they were found.
        notes: what they leave out, in sentences.
        trunk: graph nodes of the trunk that they are on, with their places.
    """

    names: tuple[str, ...]
    rule: str
    notes: tuple[str, ...] = ()
    trunk: Mapping[Node, int] = {}


def find_blocks(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, Call],
    pixels: Mapping[str, int],
    graph: Graph | None,
) -> Found:
    """The blocks of a network.

    Args:
        modules: all modules by name.
        calls: what they did in one pass, in the order in which they ended; with `:input`, the
            first tensor that each was given.
        pixels: numbers of pixels of the feature maps that modules which run once return, and
            under the names of the modules with `:input` of those that they are given.
        graph: the autograd graph of the pass, or None if it was not recorded.
    """
    why = ""
    if graph is None or not graph.trunk:
        why = "no gradient reaches the images"
    elif any("CheckpointFunction" in node.name() for node in graph.trunk):
        why = "the graph is recomputed in parts"
    if graph is None or why:
        note = f"its graph cannot be read, since {why}: blocks were told by the names of classes"
        return Found(_by_names(modules, pixels), f"names of classes, since {why}", (note,))
    found, narrower = _on_trunk(modules, calls, pixels, graph), True
    while narrower:  # a head that reads several depths hides the trunk above the first of them
        narrower = False
        ends = [graph.trunk[calls[name].left] for name in found.names]
        last = min(ends, default=len(graph.trunk))
        for merge in (m for m in found.open if graph.trunk[m] < last):
            other = graph.along_deepest(merge)
            longer = other and _on_trunk(modules, calls, pixels, other)
            if not other or not longer or len(longer.names) <= len(found.names):
                continue
            if found.names or other.share_of_work(other.branches(longer.open)) < 0.5:
                graph, found, narrower = other, longer, True
                break
    nodes = graph.branches(found.open)
    share = graph.share_of_work(nodes)
    inside = _outermost(n for n in pixels if n in modules and calls[n].left in nodes)
    if share <= _LEFT_OUT or not inside:
        return Found(found.names, found.rule, trunk=graph.trunk)
    note = (
        f"no block holds {share:.0%} of its convolutions and matrix products, in the branches of "
        f"{len(found.open)} merge(s): {', '.join(inside[:3])}{', ...' if inside[3:] else ''}"
    )
    return Found(found.names, found.rule, (note,), graph.trunk)


class _OnTrunk(NamedTuple):
    names: tuple[str, ...]
    rule: str
    open: list[Node]  # forks that none of the blocks holds


def _on_trunk(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, Call],
    pixels: Mapping[str, int],
    graph: Graph,
) -> _OnTrunk:
    spans = _spans(graph, calls, pixels)
    closed = _closed_merges(graph, spans, modules)

    def holds_one_resolution(name: str) -> bool:
        places = {place: pixels[by] for by, closing in closed.items() for place in closing}
        return len({p for place, p in places.items() if _is_in(place, spans[name])}) <= 1

    single = (n for n in filter(holds_one_resolution, closed) if len(closed[n]) <= _MOST_MERGES)
    kinds = {type(modules[n]) for n in _outermost(single)}
    blocks = _outermost(name for name in spans if type(modules[name]) in kinds)
    merges, trunk = graph.merges(), graph.trunk
    left = [n for n in graph.forks() if not any(_is_in(trunk[n], spans[b]) for b in blocks)]
    free = [node for node in left if node in merges]
    if 2 * len(free) > len(merges) and graph.share_of_largest_fork() <= 0.5:
        # Names of inputs come last, and are taken where no module returns the tensor.
        holders = {calls[name].left: name for name in reversed(list(pixels))}
        sums = {m: _holder(graph.ends_of(m), holders) for m in free}
        places = {name: trunk[m] for m, name in sums.items() if name}
        places |= {name: spans[name][1] for name in blocks}
        if places:
            names = tuple(sorted(places, key=lambda name: -places[name]))
            rule = "the network's graph: branches merge in no module of their own"
            return _OnTrunk(names, rule, [m for m, name in sums.items() if not name])
    if blocks:
        classes = sorted({type(modules[name]).__name__ for name in blocks})
        rule = f"the network's graph: branches merge in {', '.join(classes)}"
        return _OnTrunk(blocks, rule, left)
    if graph.share_of_largest_fork() > 0.5:
        return _OnTrunk((), "the network's graph: most of it is on parallel trunks", free)
    last = {pixels[n]: n for n in spans if pixels[n] > 1 and not any(modules[n].children())}
    rule = "the network's graph: the last module at each resolution"
    return _OnTrunk(tuple(last.values()), rule, free)


def _holder(ends: list[Node], holders: Mapping[Node, str]) -> str:
    """What holds a merge's value, where it is read next if it can; `""` if nothing does."""
    return next((holders[node] for node in reversed(ends) if node in holders), "")


Span = tuple[int, int]  # places on the trunk where a module is entered and left


def _spans(graph: Graph, calls: Mapping[str, Call], pixels: Mapping[str, int]) -> dict[str, Span]:
    """Modules that return a feature map, run once, and are entered and left on the trunk.

    Of several tensors on the trunk that a module is given, the last one is where it is entered:
    it could not be on the trunk if the module used what is before it.
    """
    trunk, spans = graph.trunk, dict[str, Span]()
    for name, call in calls.items():
        entered = [node for node in call.entered if node in graph.children]
        last = min((n for n in entered if n in trunk), key=lambda n: trunk[n], default=None)
        if name not in pixels or last is None or call.left not in trunk:
            continue
        if all(node in trunk or node in graph.before(last) for node in entered):
            spans[name] = trunk[last], trunk[call.left]
    return spans


def _is_in(place: int, span: Span) -> bool:
    entered, left = span  # places count from the logits
    return left <= place < entered


def _closed_merges(
    graph: Graph, spans: Mapping[str, Span], modules: Mapping[str, nn.Module]
) -> dict[str, list[int]]:
    """The modules that close a merge that none of their children closes, with these merges."""
    closed: dict[str, list[int]] = {}
    for merge in graph.merges():
        place = graph.trunk[merge]
        around = [name for name, span in spans.items() if _is_in(place, span)]
        for name in around:
            # A Sequential adds nothing: it is a module without hooks in it that does.
            if type(modules[name]) is not nn.Sequential and not any(
                other.startswith(f"{name}.") for other in around
            ):
                closed.setdefault(name, []).append(place)
    return closed


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are not inside another one of them."""
    given = list(names)
    return tuple(n for n in given if not any(n.startswith(f"{other}.") for other in given))


def _by_names(modules: Mapping[str, nn.Module], pixels: Mapping[str, int]) -> tuple[str, ...]:
    """Modules with a class name such as BasicBlock that contain no other such module."""
    named = [
        name for name in pixels if name in modules and _BLOCK.search(type(modules[name]).__name__)
    ]
    return tuple(n for n in named if not any(other.startswith(f"{n}.") for other in named))
