"""Find the blocks of a network: the modules that end in a residual addition or a concatenation."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from fusenorm_openood.structure.graph import Graph
from fusenorm_openood.structure.recording import Call

# BasicBlock, Bottleneck, PreActBlock, InvertedResidual, ...
_BLOCK = re.compile(r"(Block|Bottleneck|Residual)$")
Found = tuple[tuple[str, ...], str]  # names of blocks, and the rule that found them


def find_blocks(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, Call],
    pixels: Mapping[str, int],
    graph: Graph | None,
) -> Found:
    """The blocks of a network in the order in which they run, and how they were found.

    Args:
        modules: all modules by name.
        calls: what they did in one pass, in the order in which they ended.
        pixels: numbers of pixels of the modules that run once and return a feature map.
        graph: the autograd graph of the pass, or None if it was not recorded.
    """
    if graph is None or not graph.trunk:
        return _by_names(modules, pixels), "names of classes, since no gradient reaches the images"
    if any("CheckpointFunction" in node.name() for node in graph.trunk):
        return _by_names(
            modules, pixels
        ), "names of classes, since the graph is recomputed in parts"
    spans = _spans(graph, calls, pixels)
    closed = _closed_merges(graph, spans)

    def holds_one_resolution(name: str) -> bool:
        places = {place: pixels[by] for by, closing in closed.items() for place in closing}
        return len({p for place, p in places.items() if _is_in(place, spans[name])}) <= 1

    kinds = {type(modules[n]) for n in _outermost(filter(holds_one_resolution, closed))}
    blocks = _outermost(name for name in spans if type(modules[name]) in kinds)
    if blocks:
        names = sorted({type(modules[name]).__name__ for name in blocks})
        return blocks, f"the network's graph: branches merge in {', '.join(names)}"
    if graph.share_of_largest_fork() > 0.5:
        return (), "the network's graph: most of it is on parallel trunks"
    last = {pixels[n]: n for n in spans if pixels[n] > 1 and not any(modules[n].children())}
    return tuple(last.values()), "the network's graph: the last module at each resolution"


Span = tuple[int, int]  # places on the trunk where a module is entered and left


def _spans(graph: Graph, calls: Mapping[str, Call], pixels: Mapping[str, int]) -> dict[str, Span]:
    """Modules that return a feature map, run once, and are entered and left on the trunk.

    Of several tensors on the trunk that a module is given, the last one is where it is entered:
    it could not be on the trunk if the module used an earlier one.
    """
    trunk, spans = graph.trunk, dict[str, Span]()
    for name, call in calls.items():
        entered = [node for node in call.entered if node in graph.children]
        on_trunk = [trunk[node] for node in (*entered, call.left) if node in trunk]
        if name in pixels and entered and len(on_trunk) == len(entered) + 1:
            spans[name] = min(on_trunk[:-1]), on_trunk[-1]
    return spans


def _is_in(place: int, span: Span) -> bool:
    entered, left = span  # places count from the logits
    return left <= place < entered


def _closed_merges(graph: Graph, spans: Mapping[str, Span]) -> dict[str, list[int]]:
    """The modules that close a merge that none of their children closes, with these merges."""
    closed: dict[str, list[int]] = {}
    for merge in graph.merges():
        place = graph.trunk[merge]
        around = [name for name, span in spans.items() if _is_in(place, span)]
        for name in around:
            if not any(other.startswith(f"{name}.") for other in around):
                closed.setdefault(name, []).append(place)
    return closed


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are not inside another one of them."""
    given = list(names)
    return tuple(n for n in given if not any(n.startswith(f"{other}.") for other in given))


def _by_names(modules: Mapping[str, nn.Module], pixels: Mapping[str, int]) -> tuple[str, ...]:
    """Modules with a class name such as BasicBlock that contain no other such module."""
    named = [name for name in pixels if _BLOCK.search(type(modules[name]).__name__)]
    return tuple(n for n in named if not any(other.startswith(f"{n}.") for other in named))
