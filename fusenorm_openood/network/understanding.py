"""All that has to be known of a network before its images are scored.

Cosine heads, adapters inside or beside the final layer, masked weights, a single logit, a choice of
classes: the map is read from gradients at features other than those of images.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.kernels.devices import casts_down, full_precision
from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.method.posthoc import Head
from fusenorm_openood.network.head import (
    HALF,
    HeadLayers,
    feature_of,
    flat_feature,
    has_quantised_weight,
    head_layers,
    kept_head,
    linear_head,
)
from fusenorm_openood.network.outputs import (
    checked_activation,
    is_activation,
    logits_at,
    of_two_classes,
)
from fusenorm_openood.network.recording import recorded
from fusenorm_openood.network.running import (
    eval_mode,
    hooked,
    network_errors,
    own_pass,
    preserved_randomness,
    scoring_run,
    unwrapped,
)
from fusenorm_openood.network.structure import Structure, read_structure, two_images

PASSES = 16  # over two images, of a network that draws random numbers: it may draw the same ones

# Of a pass: inputs and outputs of the head's layers, and logits [B, K].
Listened = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor]


class Repetition(NamedTuple):
    """What a network does with the same images again; see `Structure`."""

    random: bool
    batch_dependent: bool
    smallest_batch: int


def repeated(run: Callable[[Tensor], Listened], images: Tensor) -> tuple[Listened, Repetition]:
    """What a pass over two images gives, and what other passes over them differ in.

    Args:
        run: a pass. The states of the random number generators are not restored after it.
        images: `[2, C, H, W]`.

    Raises:
        TapError: logits that are not one row per image.
    """
    before = _generators(images.device)
    first = run(images)
    draws = _generators(images.device) != before
    again = (run(images) for _ in range(PASSES if draws else 1))
    is_random = any(not _alike(other, first) for other in again)
    try:
        alone, smallest = run(images[:1]), 1
        if [x.ndim for x in _values(alone)] != [x.ndim for x in _values(first)]:
            raise ValueError("a batch of one image loses a dimension")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        try:
            alone, smallest = run(images[[0, 1, 0]]), 2
        except TapError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return first, Repetition(is_random, True, 1)
    depends = not is_random and not _close(alone[2], first[2])
    return first, Repetition(is_random, depends, 1 if depends else smallest)


def _generators(device: torch.device) -> list[Any]:
    """The states of the random number generators of torch, NumPy and Python."""
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [*(state.tolist() for state in states), random.getstate(), str(np.random.get_state())]


def _values(listened: Listened) -> list[Tensor]:
    inputs, outputs, logits = listened
    values = (logits, *inputs.values(), *outputs.values())
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _alike(found: Listened, expected: Listened) -> bool:
    pairs = zip(_values(found), _values(expected), strict=False)
    return all(x.shape == y.shape and _close(x, y) for x, y in pairs)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether values of images, the first of which may come again, differ by rounding only."""
    x, y = found.float(), expected.float()
    y = y if len(x) == len(y) else torch.cat([y, y])[: len(x)]
    if not (x.isfinite().all() and y.isfinite().all()):
        return True
    is_half = expected.dtype in HALF or casts_down(expected.device)
    tolerance = (1e-2 if is_half else 1e-3) * float(expected.max() - expected.min())
    return torch.allclose(x, y, rtol=0, atol=tolerance + 1e-6)


def understand(net: nn.Module, images: Tensor) -> Structure:
    """The structure of a network, with how its logits come from its head, and how they vary.

    A few passes over two images, which also show whether the network can be listened to at all.

    Args:
        net: any network; it is left unchanged.
        images: a batch `[B, C, H, W]` that it accepts, on its device.

    Raises:
        TapError: it is no module, fails on the images, or returns no logits `[B, K]`.
    """
    core, structure, two = unwrapped(net), read_structure(net, images), two_images(images)
    with eval_mode(core), preserved_randomness(images.device), torch.no_grad():
        with network_errors(net, two):
            listened, repetition = repeated(lambda x: _pass(core, structure, x), two)
        layers = {name: core.get_submodule(name) for name in structure.head.names}
        head, affine = _understood_head(layers, *listened), None
        if not (head.is_affine and len(head.names) == 1):
            tried = replace(structure, head=head._replace(feature=structure.head.feature))
            found = probe(core, tried, two)
            if found is not None and _holds(core, *found, listened):
                head, affine = found
    _, outputs, logits = listened
    if head.before_softmax:
        logits, activation = outputs[head.names[0]], ""
    else:
        activation = checked_activation(core, logits, structure.activation)
    logits = logits.float().nan_to_num(0, 0, 0)
    counting = logits > logits.amax(1, keepdim=True) - 100  # exp(-100) adds nothing: masked classes
    largest = float(logits[counting].abs().max())
    known = {"activation": activation, "largest_logit": largest, **repetition._asdict()}
    return replace(structure, head=head, affine=affine, **known)


Tensors = Mapping[str, Tensor]


def _pass(core: nn.Module, structure: Structure, images: Tensor) -> Listened:
    """Inputs and outputs of the head's layers, and the logits."""
    layers = head_layers(core, structure.head)
    with own_pass(), kept_head(layers) as (inputs, outputs):
        run = scoring_run(core, structure.scoring)
        output, calls = recorded(core, lambda: run(images.clone()))
    for name, layout in structure.layouts.items():
        gave = calls[name].gave[structure.outputs.get(name, 0) :] if name in calls else ()
        if gave and len(gave[0].shape) != len(layout):
            raise TapError(f"{name!r} returns {list(gave[0].shape)} for {len(images)} image(s)")
    return inputs, outputs, logits_at(core, output, structure.logits, len(images))


def _holds(core: nn.Module, head: HeadLayers, affine: Head, listened: Listened) -> bool:
    """Whether an affine function gives the logits of images; it was found at other features."""
    inputs, outputs, logits = listened
    feature = feature_of(head, head_layers(core, head), inputs, outputs)
    if head.before_softmax:
        logits = of_two_classes(outputs[head.names[0]].flatten(1))
    if feature is None or not torch.isfinite(logits).all():
        return True  # the error will be that of their scores
    given = F.linear(feature.to(affine.weight), affine.weight, affine.bias)
    tolerance = (3e-2 if logits.dtype in HALF else 1e-3) * float(logits.abs().max())
    return torch.allclose(given, logits.to(given), rtol=0, atol=tolerance)


def _understood_head(
    layers: Mapping[str, nn.Module], inputs: Tensors, outputs: Tensors, logits: Tensor
) -> HeadLayers:
    names = tuple(layers)
    equal = (1 / len(names),) * len(names) if names else ()
    known = HeadLayers(names, equal)
    if any(len(inputs[name]) != len(logits) for name in names):
        return HeadLayers()  # several features for an image, such as those of its crops
    if not torch.isfinite(logits).all():
        return known._replace(is_affine=bool(names))  # the error will be that of their scores
    single = outputs[names[0]].flatten(1) if len(names) == 1 else None
    if single is not None and is_activation(single, logits[:, -single.shape[1] :]):
        known, logits = HeadLayers(names, (1.0,), before_softmax=True), of_two_classes(single)
    sums = _sums(list(layers.values()), [inputs[name] for name in names], logits.shape)
    if not sums:
        return known
    rounded = logits.dtype in HALF or any(map(has_quantised_weight, layers.values()))
    shares, exact = find_shares(sums, logits, tolerance=3e-2 if rounded else 1e-3)
    rows_of_one = all(_is_one_row(layers[name], inputs[name]) for name in names)
    return known._replace(shares=shares, is_linear=exact and rows_of_one, is_affine=exact)


def _sums(layers: Sequence[nn.Module], inputs: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    """For each layer, the logits that its weights alone give of its feature; empty if none."""
    sums = []
    for layer, x in zip(layers, inputs, strict=True):
        head, feature = linear_head([layer], [1.0]), flat_feature(layer, x).float()
        if head is None or head.weight.shape != (shape[1], feature.shape[1]):
            return []
        sums.append(F.linear(feature, head.weight.float(), head.bias.float()))
    return sums


def _is_one_row(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's input is one feature per image, not a mean over several."""
    return x[0].numel() == flat_feature(layer, x)[0].numel()


def find_shares(
    sums: Sequence[Tensor], logits: Tensor, tolerance: float = 1e-3
) -> tuple[tuple[float, ...], bool]:
    """Factors with which tensors `[B, K]` add up to the logits, and whether they do exactly."""
    columns = torch.stack([part.flatten().cpu().double() for part in sums], dim=1)
    wanted = logits.flatten().cpu().double()
    if not columns.any():  # a head that is initialised to zero
        return (1 / len(sums),) * len(sums), not bool(wanted.any())
    found = torch.linalg.lstsq(columns, wanted.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    for plain in (1.0, 1 / len(sums)):  # one head, or a mean of several
        found[(found - plain).abs() < tolerance] = plain
    largest = float(wanted.abs().max())
    exact = torch.allclose(columns @ found, wanted, rtol=tolerance, atol=tolerance * largest)
    return tuple(found.tolist()), exact


def probe(core: nn.Module, structure: Structure, images: Tensor) -> tuple[HeadLayers, Head] | None:
    """The logits as an affine function of the feature that may be at `structure.head.feature`.

    A function of the feature itself, or else of the feature divided by its length, of which the
    logits of a cosine head are an affine function. None if it is neither.

    Args:
        core: a network in evaluation mode.
        structure: how it is built.
        images: two that it accepts.
    """
    head = structure.head
    if not head.feature:
        return None
    precise = full_precision(images.device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), precise:
            x, logits = _head_pass(core, structure, torch.cat([images, images]))
            for is_normalised in (False, True):
                found = _affine(core.get_submodule(head.feature[1]), x, logits, is_normalised)
                if found is not None:
                    kept = head._replace(is_linear=True, is_affine=True)
                    return kept._replace(is_normalised=is_normalised), found
    except Exception as error:  # a layer without a gradient, or one that checks its input
        if is_out_of_memory(error):
            raise
    return None


def _head_pass(core: nn.Module, structure: Structure, images: Tensor) -> tuple[Tensor, Tensor]:
    """Values in place of the tensor that holds the feature, and the logits that come from them."""
    side, *names = structure.head.feature
    values = list[Tensor]()

    def replace(x: Tensor) -> Tensor:
        if not values:
            generator = torch.Generator("cpu").manual_seed(0)
            shape = (2, *x.shape[1:])
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
            noise *= x[0].abs().mean()
            new = torch.cat([x[:1], -x[:1], 3 * noise[:1], 0.3 * noise[1:]])
            values.append(new.detach().requires_grad_())
        return values[0]

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return replace(output)

    readers = {name: core.get_submodule(name) for name in names}
    left = list(readers.values()) if side == "output" else []
    with (
        own_pass(),
        hooked(after=[(module, after) for module in left]),
        kept_head({} if left else readers, replace),
        kept_head(head_layers(core, structure.head)) as (_, outputs),
    ):
        output = scoring_run(core, structure.scoring)(images)
    if structure.head.before_softmax:
        return values[0], of_two_classes(outputs[structure.head.names[0]].flatten(1))
    return values[0], logits_at(core, output, structure.logits, len(images))


def _affine(module: nn.Module, x: Tensor, logits: Tensor, is_normalised: bool) -> Head | None:
    """The map that these logits `[N, K]` and their gradients show, computed in float64."""
    tolerance = 3e-2 if logits.dtype in HALF else 1e-3
    feature = flat_feature(module, x)
    u = _on_cpu(feature)
    length = u.new_ones(len(x), 1)
    if is_normalised:
        length = u.norm(dim=1, keepdim=True)
        u = u / length

    def solved(scores: Tensor) -> tuple[Tensor, Tensor] | None:
        (gradient,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
        g = _on_cpu(flat_feature(module, gradient)) * (x[0].numel() / u.shape[1])
        s = _on_cpu(scores)
        if not is_normalised:
            w = g.mean(0)
            return (w, (s - u @ w).mean()) if _agrees(g, w, tolerance) else None
        # Of the score w u + b, the gradient is (w - (w u) u) / |f|: `sums` are w + b u.
        sums, apart = length * g + s.unsqueeze(1) * u, u - u.mean(0)
        b = ((sums - sums.mean(0)) * apart).sum() / apart.square().sum()
        w = (sums - b * u).mean(0)
        return (w, b) if _agrees(sums, w + b * u, tolerance) else None

    mixture = torch.linspace(0.5, 1.5, logits.shape[1], dtype=torch.float32, device=logits.device)
    if solved(logits @ mixture.to(logits)) is None:
        return None  # a mixture of all classes shows it at once
    rows = [row for k in range(logits.shape[1]) if (row := solved(logits[:, k])) is not None]
    if len(rows) < logits.shape[1]:
        return None
    weight, bias = (torch.stack(parts) for parts in zip(*rows, strict=True))
    if not _agrees(u @ weight.T + bias, _on_cpu(logits), tolerance):
        return None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return Head(weight.to(logits.device, dtype), bias.to(logits.device, dtype))


def _agrees(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * found.abs().max())


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
