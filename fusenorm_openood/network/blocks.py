"""Find the blocks of a network: the modules that end in a residual addition or a concatenation."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from fusenorm_openood.network.graph import Call, Graph, Node

# BasicBlock, Bottleneck, PreActBlock, InvertedResidual, ...
_BLOCK = re.compile(r"(Block|Bottleneck|Residual)$")
_LEFT_OUT = 0.1  # share of the work in branches that no block holds, above which a note says so
_MOST_MERGES = 3  # that one block adds in its own forward; more are a sequence of blocks

Modules = Mapping[str, nn.Module]
Calls = Mapping[str, Call]
Span = tuple[int, int]  # places on the trunk where a module is entered and left


class Found(NamedTuple):
    """The blocks of a network, in the order in which they run.

    Where no module returns a block's output, its name is that of the module that is given it,
    followed by `:input`.
    """

    names: tuple[str, ...]
    rule: str  # how they were found
    trunk: Mapping[Node, int] = {}  # of the graph that they were found in
    left: Sequence[Node] = ()  # its forks that no block holds
    notes: tuple[str, ...] = ()  # what the blocks leave out


def find_blocks(modules: Modules, calls: Calls, pixels: Mapping[str, int], graph: Graph) -> Found:
    """The blocks of a network, from one pass with a graph.

    `calls` are in the order in which the modules ended; names with `:input` stand for the first
    tensor that a module was given. `pixels` are those of the feature maps of modules that run once.
    """
    why = "" if graph.trunk else "no gradient reaches the images"
    if any("CheckpointFunction" in node.name() for node in graph.trunk):
        why = "the graph is recomputed in parts"
    if why:
        named = [n for n in pixels if n in modules and _BLOCK.search(type(modules[n]).__name__)]
        innermost = [n for n in named if not any(other.startswith(f"{n}.") for other in named)]
        note = f"its graph cannot be read, since {why}: blocks were found by the names of classes"
        return Found(tuple(innermost), f"names of classes, since {why}", notes=(note,))
    found = _on_trunk(modules, calls, pixels, graph)
    while narrower := _along_a_branch(modules, calls, pixels, graph, found):
        graph, found = narrower
    nodes = graph.branches(found.left)
    share = graph.share_of_work(nodes)
    inside = outermost(n for n in pixels if n in modules and calls[n].left in nodes)
    if share <= _LEFT_OUT or not inside:
        return found
    note = (
        f"no block holds {share:.0%} of its convolutions and matrix products, in the branches of "
        f"{len(found.left)} merge(s): {', '.join(inside[:3])}{', ...' if inside[3:] else ''}"
    )
    return found._replace(notes=(note,))


def _along_a_branch(
    modules: Modules, calls: Calls, pixels: Mapping[str, int], graph: Graph, found: Found
) -> tuple[Graph, Found] | None:
    """More blocks, along the deepest branch of a merge, and the graph with this branch alone."""
    # A head that reads several depths hides the trunk above the first of them, so branches of
    # merges are tried that come after all blocks.
    names, trunk = found.names, graph.trunk
    last = min((trunk[calls[name].left] for name in names), default=len(trunk))
    for merge in (m for m in found.left if trunk[m] < last):
        if narrower := graph.along_deepest(merge):
            more = _on_trunk(modules, calls, pixels, narrower)
            free = narrower.share_of_work(narrower.branches(more.left))
            if len(more.names) > len(names) and (names or free < 0.5):
                return narrower, more
    return None


def _on_trunk(modules: Modules, calls: Calls, pixels: Mapping[str, int], graph: Graph) -> Found:
    """The blocks on the trunk of a graph, and the forks that none of them holds."""
    spans = _spans(graph, calls, pixels)
    closed = _closed_merges(graph, spans, modules)

    def holds_one_resolution(name: str) -> bool:
        places = {place: pixels[by] for by, closing in closed.items() for place in closing}
        return len({p for place, p in places.items() if _is_in(place, spans[name])}) <= 1

    # A class that ends a merge somewhere is a block wherever it is on the trunk.
    single = (n for n in filter(holds_one_resolution, closed) if len(closed[n]) <= _MOST_MERGES)
    kinds = {type(modules[n]) for n in outermost(single)}
    blocks = outermost(name for name in spans if type(modules[name]) in kinds)
    merges, trunk = graph.merges(), graph.trunk
    left = [n for n in graph.forks() if not any(_is_in(trunk[n], spans[b]) for b in blocks)]
    free = [node for node in left if node in merges]
    parallel = graph.has_parallel_trunks()
    if 2 * len(free) > len(merges) and not parallel:
        # Most sums are in the forward of a module around the blocks: take what holds their values.
        # Names of inputs come last, and are taken where no module returns the tensor.
        holders = {calls[name].left: name for name in reversed(list(pixels))}
        sums = {
            merge: next((holders[n] for n in reversed(graph.ends_of(merge)) if n in holders), "")
            for merge in free
        }
        places = {name: trunk[merge] for merge, name in sums.items() if name}
        places |= {name: spans[name][1] for name in blocks}
        if places:
            names = tuple(sorted(places, key=lambda name: -places[name]))
            rule = "the network's graph: branches merge in no module of their own"
            return Found(names, rule, trunk, [merge for merge, name in sums.items() if not name])
    if blocks:
        classes = sorted({type(modules[name]).__name__ for name in blocks})
        rule = f"the network's graph: branches merge in {', '.join(classes)}"
        return Found(blocks, rule, trunk, left)
    if parallel:
        return Found((), "the network's graph: most of it is on parallel trunks", trunk, free)
    last = {pixels[n]: n for n in spans if pixels[n] > 1 and not any(modules[n].children())}
    rule = "the network's graph: the last module at each resolution"
    return Found(tuple(last.values()), rule, trunk, free)


def _spans(graph: Graph, calls: Calls, pixels: Mapping[str, int]) -> dict[str, Span]:
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
    graph: Graph, spans: Mapping[str, Span], modules: Modules
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


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are not inside another one of them."""
    given = list(names)
    return tuple(n for n in given if not any(n.startswith(f"{other}.") for other in given))
