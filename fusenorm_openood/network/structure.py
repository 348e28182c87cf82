"""How a network is built, read from one pass over two images: blocks, layouts, stages, head."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import FuseNormError, is_out_of_memory
from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network import running
from fusenorm_openood.network.blocks import find_blocks, outermost
from fusenorm_openood.network.graph import INPUT, Call, Graph, Node, WithGraph, recorded
from fusenorm_openood.network.head import HeadLayers, weight_of
from fusenorm_openood.network.layouts import Prefix, find_layout, find_prefixes, pixels
from fusenorm_openood.network.outputs import find_logits, last_activation, logits_at, value_at
from fusenorm_openood.storage.configs import typed

_IN_JSON = {"batch_dependent": "mixes"}  # attributes with another name in files


@dataclass(frozen=True)
class Structure:
    """How a network is built, and how its passes have to be read."""

    blocks: tuple[str, ...]  # names in the order in which they run; empty if none was found
    rule: str  # how they were found
    runs: Mapping[str, int]  # how often each module runs in a pass
    shapes: Mapping[str, tuple[int, ...]]  # of what each module returns for two images
    layouts: Mapping[str, str]  # `BCHW` or the like, where a module runs once and returns a map
    pixels: Mapping[str, int]  # of these feature maps, without prefix tokens
    head: HeadLayers
    classes: int  # number of logits, two for a single one
    logits: running.Path = ()  # where they are in the output
    scoring: str | None = None  # name of the module with separate scoring logits
    batch_dependent: bool = False  # the images of a batch influence each other's logits
    random: bool = False  # two passes over the same images give other logits
    smallest_batch: int = 1  # 2 if the network cannot take one image alone
    activation: str = ""  # `log_softmax` if the logits are log-probabilities, whose energy is 0
    largest_logit: float = field(default=0.0, compare=False)  # of two images; it varies with them
    affine: Head | None = field(default=None, compare=False)  # of `head.feature`; not in files
    prefixes: Mapping[str, Prefix] = field(default_factory=dict)  # of tokens, where found
    outputs: Mapping[str, int] = field(default_factory=dict)  # which tensor is the map, if not 0
    notes: tuple[str, ...] = ()  # what the blocks leave out

    def to_json(self) -> dict[str, Any]:
        """The structure in terms of JSON, without `affine`; see `from_json`."""
        prefixes = {name: prefix._asdict() for name, prefix in self.prefixes.items()}
        record = {**vars(self), "head": self.head._asdict(), "prefixes": prefixes}
        del record["affine"]
        return {_IN_JSON.get(name, name): value for name, value in record.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Structure":
        """The structure that `to_json` gave; ConfigError if it is something else.

        If its head has a `feature`, its `affine` has to be found anew.
        """
        names = {name: own for own, name in _IN_JSON.items()}
        record = {names.get(name, name): value for name, value in record.items()}
        structure: Structure = typed(cls, record, "structure")
        head = structure.head
        return replace(structure, head=head._replace(is_affine=head.is_affine or head.is_linear))

    def stages(self, taps: Sequence[str]) -> list[list[str]]:
        """Layers by stage: those of a stage follow each other and have equally many pixels."""
        return [list(stage) for _, stage in groupby(taps, key=lambda tap: self.pixels.get(tap))]


def read_structure(net: nn.Module, images: Tensor) -> Structure:
    """The structure of a network, from one pass over two images; see `understand`."""
    core, two = running.unwrapped(net), two_images(images)
    with running.eval_mode(core), running.preserved_randomness(images.device):
        output, calls, leaf = _recorded(core, two)
        path = find_logits(core, output, len(two))
        logits = logits_at(core, output, path, len(two))
        if value_at(output, path).ndim == 1:  # [2] may be something else than one logit per image
            three = torch.cat([two, two[:1]])
            with running.own_pass(), torch.no_grad():
                output = running.scoring_run(core, running.scoring_module(core))(three)
            logits_at(core, output, path, len(three))
        graph, modules = Graph(logits, leaf), dict(core.named_modules())
        for call in calls.values():
            call.choose(graph.trunk)
        head = _find_head(modules, calls, graph, logits.shape[1])
    once = {name: call for name, call in calls.items() if name and call.runs == 1}
    given = {name + INPUT: Call(1, gave=(call.took,)) for name, call in once.items() if call.took}
    calls |= given  # where no module returns a block's output, it is read at another one's input
    layouts = {
        name: layout
        for name in (*once, *given)
        if (layout := find_layout(name, calls, modules, two.shape))
    }
    sizes = {name: pixels(calls[name].shape, layouts[name], two.shape) for name in layouts}
    found = find_blocks(modules, calls, sizes, graph)
    for name in given.keys() - set(found.names):
        calls.pop(name)
        layouts.pop(name, None)
    prefixes = find_prefixes(calls, layouts, found.trunk, two.shape)
    return Structure(
        blocks=found.names,
        rule=found.rule,
        runs={name: call.runs for name, call in calls.items()},
        shapes={name: call.shape for name, call in calls.items()},
        layouts=layouts,
        pixels={
            name: pixels(calls[name].shape, layout, two.shape, prefixes.get(name))
            for name, layout in layouts.items()
        },
        head=head,
        classes=logits.shape[1],
        logits=path,
        scoring=running.scoring_module(core),
        activation=last_activation(logits.grad_fn),
        prefixes=prefixes,
        outputs={name: calls[name].index for name in layouts if calls[name].index},
        notes=found.notes,
    )


def two_images(images: Tensor) -> Tensor:
    """The first two images of a batch; a single one is followed by its mirror image."""
    images = images[:2].detach().nan_to_num(0, 1, -1)
    return torch.cat([images, images.flip(-1)]) if len(images) == 1 else images


def _recorded(core: nn.Module, images: Tensor) -> tuple[Any, dict[str, Call], Tensor]:
    """Output and calls of a pass with a graph, or without one where that is impossible."""
    run = running.scoring_run(core, running.scoring_module(core))
    leaf = images.clone().requires_grad_()
    for mode in (WithGraph(), nullcontext()):
        try:
            with running.own_pass(), torch.inference_mode(False), torch.enable_grad(), mode:
                return *recorded(core, lambda: run(leaf.clone())), leaf
        except FuseNormError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
    with running.network_errors(core, images), running.own_pass(), torch.no_grad():
        return *recorded(core, lambda: run(images.clone())), leaf


def _find_head(
    modules: Mapping[str, nn.Module], calls: Mapping[str, Call], graph: Graph, classes: int
) -> HeadLayers:
    """The layers that make the logits, and the last feature before all matrix products."""
    names = _find_head_layers(modules, calls, graph, classes)
    places = graph.before_products()
    readers, writers = defaultdict[Node, list[str]](list), dict[Node, str]()
    for name, call in calls.items():
        made = call.left in places and call.left not in call.entered
        if name and call.runs == 1 and call.is_alone and made:
            writers.setdefault(call.left, name)
        if name and len(call.entered) == 1 and call.entered[0] in places:
            readers[call.entered[0]].append(name)
    nearest = min((*writers, *readers), key=lambda node: places[node], default=None)
    if nearest in writers:
        return HeadLayers(names, feature=("output", writers[nearest]))
    if nearest in readers:
        return HeadLayers(names, feature=("input", *outermost(readers[nearest])))
    return HeadLayers(names, feature=("input", *names) if len(names) == 1 else ())


def _find_head_layers(
    modules: Mapping[str, nn.Module], calls: Mapping[str, Call], graph: Graph, classes: int
) -> tuple[str, ...]:
    """The first layers with a weight matrix on the way back from the logits."""

    def makes_logits(name: str) -> bool:
        shape = calls[name].shape[1:]
        return classes in shape or (classes == 2 and prod(shape) == 1)  # two, or a single logit

    weighted = {n: call for n, call in calls.items() if n and weight_of(modules[n]) is not None}
    if not graph.trunk:
        return tuple(n for n in weighted if makes_logits(n) and len(calls[n].shape) == 2)[-1:]
    layers = {node: n for n, call in weighted.items() for node in (*call.earlier, call.left)}
    found = graph.first_on_every_path(layers)
    if not all(makes_logits(layers[n]) and calls[layers[n]].left is n for n in found):
        return ()  # not a classifier's layer, or one that is applied several times
    names = {layers[node] for node in found}
    return tuple(name for name in modules if name in names)
