"""One forward pass through an arbitrary network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.taps import unusable_tap
from fusenorm_openood.kernels.devices import full_precision
from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network import running
from fusenorm_openood.network.graph import INPUT
from fusenorm_openood.network.head import HALF, feature_of, head_layers, hooked_head, linear_head
from fusenorm_openood.network.layouts import as_maps
from fusenorm_openood.network.outputs import logits_at, of_two_classes
from fusenorm_openood.network.resnet import classification_feature
from fusenorm_openood.network.structure import Structure

PIXELS = 2**14  # image pixels that one CPU thread processes at a time


class Thinning(Protocol):
    """Which images stay in a batch during a pass."""

    kept: Tensor  # their numbers in the batch that the pass began with

    def after(self, name: str, reduced: Mapping[str, Tensor]) -> Tensor | None:
        """The numbers of those that stay after a module, in the batch before it; None = all do."""


class ForwardPass(NamedTuple):
    """Result of one forward pass over `B` images."""

    maps: dict[str, Tensor]  # what was made of each tap's feature map `[B, ...]`, such as its norms
    feature: Tensor | None  # input `[B, D]` of the layers that make the logits, None without these
    # Logits `[B, K]` that OOD scores are computed from, at least in float32: a final linear layer
    # is applied in full precision where autocast or its weights are half.
    logits: Tensor
    classified: Tensor  # logits `[B, K]` that classes are predicted from
    activations: Tensor | None  # the input `[B, A]` as `feature`, before any mean over its pixels

    @property
    def pred(self) -> Tensor:
        """Predicted classes `[B]`."""
        return self.classified.argmax(dim=1)

    def without_last(self) -> "ForwardPass":
        """The pass over all images but the last."""
        maps = {name: value[:-1] for name, value in self.maps.items()}
        rest = (None if t is None else t[:-1] for t in self[1:])
        return ForwardPass(maps, *rest)  # type: ignore[arg-type]

    @classmethod
    def joined(cls, passes: Sequence["ForwardPass"]) -> "ForwardPass":
        """The passes over the parts of a batch as one, without their graphs and activations."""
        maps, features, logits, classified, _ = zip(*passes, strict=True)
        found = [feature.detach() for feature in features if feature is not None]
        return cls(
            {name: torch.cat([part[name] for part in maps]) for name in maps[0]},
            torch.cat(found) if found else None,
            torch.cat([part.detach() for part in logits]),
            torch.cat(classified),
            None,
        )


def forward_pass(
    net: nn.Module,
    images: Tensor,
    structure: Structure,
    taps: Sequence[str] = (),
    reduce: Callable[[Tensor], Tensor] = torch.clone,
    threshold: float | None = None,
    thinning: Thinning | None = None,
) -> ForwardPass:
    """Run a network once: feature norms of its layers, penultimate feature, and logits.

    A network that uses different logits for scoring than for classification, such as T2FNorm's,
    returns them from a method `forward_ood_inference`; they are then the logits of the pass. The
    network gets a copy of the images, so it may change them. Too small a batch is run with a copy
    of its first image.

    Args:
        images: `[B, C, H, W]` on the network's device.
        taps: names of the modules to tap.
        reduce: from the feature maps `[B, C, H, W]` of a tap to what is kept of them, `[B, ...]`.
        threshold: clips the input of the layers that make the logits, as ReAct does.
        thinning: images that leave the batch during the pass, which is then over those that stay.

    TapError for an unusable tap (see `hooked_layers`), or logits that are not `[B, K]`.
    """
    # In a trace, which holds for all sizes, a batch always counts as too small.
    traced, core = torch.compiler.is_compiling(), running.unwrapped(net)
    is_short = structure.smallest_batch > 1 and (traced or len(images) == 1)
    images = torch.cat([images, images[:1]]) if is_short else images
    layers = head_layers(core, structure.head)
    clip = None if threshold is None else partial(torch.clamp, max=threshold)
    with (
        running.own_pass(),
        hooked_layers(core, taps, structure, images.shape, reduce, thinning) as maps,
        hooked_head(layers, clip) as (inputs, outputs),
    ):
        output = running.scoring_run(core, structure.scoring)(images.clone())
    images = images if thinning is None else images[thinning.kept]
    feature = feature_of(structure.head, layers, inputs, outputs)
    logits = _logits(core, structure, layers, output, inputs, outputs, feature, images.shape[0])
    classified = logits.detach()
    if structure.scoring is not None:
        with torch.no_grad():
            classified = _classified(core, structure, inputs, images)
    flat = [inputs[name].flatten(1) for name in structure.head.names]
    flat = [feature] if structure.head.feature and feature is not None else flat
    activations = None if not flat else flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
    done = ForwardPass(maps, feature, logits, classified, activations)
    return done.without_last() if is_short else done


@contextmanager
def hooked_layers(
    net: nn.Module,
    names: Sequence[str],
    structure: Structure,
    image: Sequence[int],
    reduce: Callable[[Tensor], Tensor],
    thinning: Thinning | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Reduce the feature maps of the named modules during one forward pass.

    Yields a dict that the pass fills with `reduce(feature map)` by module name, where the feature
    map is `[B, C, H, W]` whatever the module's layout, and dequantised. The reduction
    runs inside the hook, without gradients, so no feature map outlives it. The hooks act only in
    the pass of this thread, and are removed on exit, also after an exception. `image` is the shape
    of the batch; for the other arguments see `forward_pass`. TapError for a tap that returns no
    feature map, fires twice or never fires.
    """
    reduced = dict[str, Tensor]()

    def take(name: str, module: nn.Module, args: Any, value: Any) -> Tensor | None:
        layout, number = structure.layouts.get(name), structure.outputs.get(name, 0)
        if type(value) is Tensor and not value.is_quantized:
            found: Tensor | None = value  # the usual case, without a search
        else:
            found = next((x for _, x in islice(running.tensors_in(value), number, None)), None)
        if name in reduced or found is None or layout is None or found.ndim != len(layout):
            shape = () if found is None else tuple(found.shape)
            runs = max(structure.runs.get(name, 1), 1 + (name in reduced))
            raise unusable_tap(net, name, runs, shape)
        with torch.no_grad():
            found = found.detach()
            if layout != "BCHW":
                found = as_maps(found, layout, image, structure.prefixes.get(name))
            reduced[name] = reduce(found)
            kept = None if thinning is None else thinning.after(name, reduced)
        if kept is None:
            return None
        reduced.update({name: of_all[kept] for name, of_all in reduced.items()})
        part: Tensor | None = value[kept]
        return part

    def take_input(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        take(name, module, (), (args, kwargs))

    before, after = [], []
    for name in names:
        if name.endswith(INPUT):
            before.append((net.get_submodule(name.removesuffix(INPUT)), partial(take_input, name)))
        else:
            after.append((net.get_submodule(name), partial(take, name)))
    with running.hooked(before, after):
        yield reduced
    for name in set(names) - reduced.keys():
        raise unusable_tap(net, name, 0, ())


def parts(images: Tensor, mixes: bool = False, with_graph: bool = False) -> tuple[Tensor, ...]:
    """Split images `[B, C, H, W]` into parts of a size that is fast on their device.

    A batch whose images influence each other stays whole; see `Structure.batch_dependent`.

    On a CPU, the feature maps of a large part do not fit into the caches, all the less with a graph
    for gradients, and the allocator returns their memory to the operating system at every layer; a
    small part spends its time reading weights. The parts are equally large, for the kernels of tiny
    ones round in another way. On any other device the batch stays whole.
    """
    if mixes or images.device.type != "cpu":
        return (images,)
    of_a_thread = max(PIXELS // max(images.shape[2:].numel(), 1), 4)
    largest = torch.get_num_threads() * of_a_thread // (1 + with_graph)
    return images.tensor_split(max(-(-len(images) // largest), 1))


def _logits(
    core: nn.Module,
    structure: Structure,
    layers: Mapping[str, nn.Module],
    output: Any,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    feature: Tensor | None,
    batch: int,
) -> Tensor:
    for name in layers.keys() - outputs.keys():
        raise TapError(
            f"{type(core).__name__} made its logits without {name!r}, with which it was "
            "understood: fit again"
        )
    last = structure.head.names[-1:]
    if structure.head.before_softmax:
        logits = of_two_classes(outputs[last[0]].flatten(1))
        return logits.float() if logits.dtype in HALF else logits
    logits = logits_at(core, output, structure.logits, batch)
    if logits.dtype in HALF and structure.affine is not None and feature is not None:
        weight, bias = (t.to(feature.device) for t in structure.affine)
        with full_precision(logits.device):
            return F.linear(feature.float(), weight, bias)
    if last and logits is outputs[last[0]] and isinstance(layers[last[0]], nn.Linear):
        return _in_full(layers[last[0]], inputs[last[0]], logits)
    return logits.float() if logits.dtype in HALF else logits


def _classified(
    core: nn.Module, structure: Structure, inputs: Mapping[str, Tensor], images: Tensor
) -> Tensor:
    """Logits for classification of a network that uses other logits for scoring."""
    scoring = core.get_submodule(structure.scoring or "")
    if len(structure.head.names) == 1:
        (name,) = structure.head.names
        normalised = classification_feature(scoring, inputs[name])
        if normalised is not None:
            head = core.get_submodule(name)
            return _in_full(head, normalised, head(normalised))
    return logits_at(core, core(images.clone()), structure.logits, images.shape[0])


def head_of(
    net: nn.Module,
    structure: Structure,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Head:
    """Weight and bias of the network's logits as an affine function of its feature.

    TapError if they are none.
    """
    stored: Any = net.stored if isinstance(net, running.LazyNetwork) else None
    found = structure.affine
    if stored is not None and stored.head is not None:
        found = Head(*stored.head)
    elif found is None and structure.head.is_affine:
        core = running.unwrapped(net)
        layers = list(map(core.get_submodule, structure.head.names))
        trains = any(map(attrgetter("training"), layers))  # a spectral norm then changes when read
        with running.eval_mode(nn.ModuleList(layers)) if trains else nullcontext():
            found = linear_head(layers, structure.head.shares)
    if found is None:
        raise TapError(
            f"the logits of {type(net).__name__} are no linear function of a feature, whose "
            "weights an expert needs: set strong=['output']"
        )
    weight, bias = found
    if dtype is not None:
        weight, bias = weight.to(dtype), bias.to(dtype)
    # In a trace, nothing is moved that is there already.
    is_there = device is None or weight.device == bias.device == device
    return Head(weight, bias) if is_there else Head(weight.to(device), bias.to(device))


def head_logits(net: nn.Module, structure: Structure, feature: Tensor) -> Tensor:
    """Logits `[B, K]` of features `[B, D]`, on their device and at least in float32."""
    feature = feature.float() if feature.dtype in HALF else feature
    with full_precision(feature.device):
        return F.linear(feature, *head_of(net, structure, feature.device, feature.dtype))


def _in_full(head: nn.Module, feature: Tensor, logits: Tensor) -> Tensor:
    own: Any = type(head).forward  # that of a subclass may add to what its weights give
    if logits.dtype not in HALF or own is not nn.Linear.forward or not isinstance(head, nn.Linear):
        return logits
    bias = None if head.bias is None else head.bias.float()
    with full_precision(logits.device):
        return F.linear(feature.float(), head.weight.float(), bias)
