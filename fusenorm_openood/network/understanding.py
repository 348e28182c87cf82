"""Read how a network is built and how its passes vary, before its images are scored."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError, is_out_of_memory
from fusenorm_openood.kernels.devices import casts_down, full_precision
from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network import graph, running
from fusenorm_openood.network import head as heads
from fusenorm_openood.network.outputs import (
    checked_activation,
    is_activation,
    logits_at,
    of_two_classes,
)
from fusenorm_openood.network.structure import Structure, read_structure, two_images

PASSES = 16  # over two images, of a network that draws random numbers: it may draw the same ones
# Logits and what gives them agree up to this part of the largest, in half precision or not. Half
# precision has 2 or 3 digits, and a sum over features loses some of them.
ROUNDED, EXACT = 3e-2, 1e-3


def understand(net: nn.Module, images: Tensor) -> Structure:
    """The structure of a network: one pass with a graph, the same images again, and the head.

    The logits are found as a function of the penultimate feature from the weights of the last
    layers, or, where these do not give them (cosine heads, adapters, masked weights, a single
    logit, a choice of classes), from gradients. The network, any that accepts a batch of images
    `[B, C, H, W]` on its device, is left unchanged. TapError if it is no module, fails on the
    images, or returns no logits `[B, K]`.
    """
    core, structure, two = running.unwrapped(net), read_structure(net, images), two_images(images)
    with running.eval_mode(core), running.preserved_randomness(images.device), torch.no_grad():
        with running.network_errors(net, two):
            before = _generators(images.device)
            first = _pass(core, structure, two)
            passes = PASSES if _generators(images.device) != before else 1
            again = (_pass(core, structure, two) for _ in range(passes))
            is_random = any(not _is_alike(other, first) for other in again)
            depends, smallest = _depends_on_batch(core, structure, two, first)
        depends = depends and not (is_random and smallest)
        layers = {name: core.get_submodule(name) for name in structure.head.names}
        head, affine = _head_by_weights(layers, first), None
        if not (head.is_affine and len(head.names) == 1):
            tried = replace(structure, head=head._replace(feature=structure.head.feature))
            head, affine = _head_by_gradients(core, tried, two, first) or (head, None)
    logits, activation = first.logits, ""
    if head.before_softmax:
        logits = first.outputs[head.names[0]]
    else:
        activation = checked_activation(core, logits, structure.activation)
    logits = logits.float().nan_to_num(0, 0, 0)
    counting = logits > logits.amax(1, keepdim=True) - 100  # exp(-100) adds nothing: masked classes
    return replace(
        structure,
        head=head,
        affine=affine,
        activation=activation,
        largest_logit=float(logits[counting].abs().max()),
        random=is_random,
        batch_dependent=depends,
        smallest_batch=1 if depends else smallest,
    )


class _Pass(NamedTuple):
    """Inputs and outputs of the head's layers, and logits `[B, K]`."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    logits: Tensor

    def values(self) -> list[Tensor]:
        values = (self.logits, *self.inputs.values(), *self.outputs.values())
        return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _pass(core: nn.Module, structure: Structure, images: Tensor) -> _Pass:
    layers = heads.head_layers(core, structure.head)
    with running.own_pass(), heads.hooked_head(layers) as (inputs, outputs):
        run = running.scoring_run(core, structure.scoring)
        output, calls = graph.recorded(core, lambda: run(images.clone()))
    for name, layout in structure.layouts.items():
        gave = calls[name].gave[structure.outputs.get(name, 0) :] if name in calls else ()
        if gave and len(gave[0].shape) != len(layout):
            raise TapError(f"{name!r} returns {list(gave[0].shape)} for {len(images)} image(s)")
    return _Pass(inputs, outputs, logits_at(core, output, structure.logits, len(images)))


def _generators(device: torch.device) -> list[Any]:
    """The states of the random number generators of torch, NumPy and Python."""
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [*(state.tolist() for state in states), random.getstate(), str(np.random.get_state())]


def _depends_on_batch(
    core: nn.Module, structure: Structure, two: Tensor, first: _Pass
) -> tuple[bool, int]:
    """Whether other images of a batch change the logits, and the smallest batch, 0 if unknown."""
    for smallest, images in ((1, two[:1]), (2, torch.cat([two, two[:1]]))):
        try:
            found = _pass(core, structure, images)
            dimensions = [[x.ndim for x in one.values()] for one in (found, first)]
            if smallest == 1 and dimensions[0] != dimensions[1]:
                continue
        except Exception as error:
            if is_out_of_memory(error) or (smallest == 2 and isinstance(error, TapError)):
                raise
            continue
        return not _is_close(found.logits, first.logits), smallest
    return True, 0


def _is_alike(found: _Pass, expected: _Pass) -> bool:
    pairs = zip(found.values(), expected.values(), strict=False)
    return all(x.shape == y.shape and _is_close(x, y) for x, y in pairs)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether values of images, the first of which may come again, differ by rounding only."""
    x, y = found.float(), expected.float()
    y = y if len(x) == len(y) else torch.cat([y, y])[: len(x)]
    if not (x.isfinite().all() and y.isfinite().all()):
        return True
    # Kernels round otherwise in batches of other sizes; other images have more influence than that.
    is_half = expected.dtype in heads.HALF or casts_down(expected.device)
    tolerance = (1e-2 if is_half else 1e-3) * float(expected.max() - expected.min())
    return torch.allclose(x, y, rtol=0, atol=tolerance + 1e-6)


def _head_by_weights(layers: Mapping[str, nn.Module], first: _Pass) -> heads.HeadLayers:
    """How the logits come from the last layers, as far as the weights of these give them."""
    (inputs, outputs, logits), names = first, tuple(layers)
    found = heads.HeadLayers(names, (1 / len(names),) * len(names) if names else ())
    if any(len(inputs[name]) != len(logits) for name in names):
        return heads.HeadLayers()  # several features for an image, such as those of its crops
    if not torch.isfinite(logits).all():
        return found._replace(is_affine=bool(names))  # the error will be that of their scores
    single = outputs[names[0]].flatten(1) if len(names) == 1 else None
    if single is not None and is_activation(single, logits[:, -single.shape[1] :]):
        found, logits = heads.HeadLayers(names, (1.0,), before_softmax=True), of_two_classes(single)
    sums = list[Tensor]()  # of each layer, the logits that its weights give of its feature
    for name, layer in layers.items():
        head = heads.linear_head([layer], [1.0])
        feature = heads.flat_feature(layer, inputs[name]).float()
        if head is None or head.weight.shape != (logits.shape[1], feature.shape[1]):
            return found
        sums.append(F.linear(feature, head.weight.float(), head.bias.float()))
    if not sums:
        return found
    rounded = logits.dtype in heads.HALF or any(map(heads.has_quantised_weight, layers.values()))
    shares, exact = find_shares(sums, logits, ROUNDED if rounded else EXACT)
    has_pixels = any(
        inputs[n].numel() != heads.flat_feature(m, inputs[n]).numel() for n, m in layers.items()
    )
    return found._replace(shares=shares, is_linear=exact and not has_pixels, is_affine=exact)


def find_shares(
    sums: Sequence[Tensor], logits: Tensor, tolerance: float = EXACT
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


def _head_by_gradients(
    core: nn.Module, structure: Structure, images: Tensor, first: _Pass
) -> tuple[heads.HeadLayers, Head] | None:
    """The logits as an affine function of the feature at `structure.head.feature`.

    Of the feature itself, or else of its direction, as those of a cosine head are; the function is
    found at other features than those of the images, and must hold there as well.
    """
    head = structure.head
    if not head.feature:
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), full_precision(images.device):
            x, logits = _pass_of_other_features(core, structure, torch.cat([images, images]))
            module = core.get_submodule(head.feature[1])
            found = _affine(module, x, logits, False)
            is_normalised = found is None
            found = found or _affine(module, x, logits, True)
    except Exception as error:  # a layer without a gradient, or one that checks its input
        if is_out_of_memory(error):
            raise
        return None
    if found is None:
        return None
    head = head._replace(is_linear=True, is_affine=True, is_normalised=is_normalised)
    feature = heads.feature_of(head, heads.head_layers(core, head), first.inputs, first.outputs)
    logits = _scored(head, first.outputs, first.logits)
    if feature is not None and torch.isfinite(logits).all():  # else the scores raise their error
        given = F.linear(feature.to(found.weight), found.weight, found.bias)
        tolerance = _tolerance(logits) * float(logits.abs().max())
        if not torch.allclose(given, logits.to(given), rtol=0, atol=tolerance):
            return None
    return head, found


def _pass_of_other_features(
    core: nn.Module, structure: Structure, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Values in place of the tensor that holds the feature, and the logits that come from them.

    A ReLU or a clamp before the logits shows at negatives and at noise, small and large.
    """
    side, *names = structure.head.feature
    values = list[Tensor]()

    def other(x: Tensor) -> Tensor:
        if not values:
            generator = torch.Generator("cpu").manual_seed(0)
            shape = (2, *x.shape[1:])
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
            noise *= x[0].abs().mean()
            new = torch.cat([x[:1], -x[:1], 3 * noise[:1], 0.3 * noise[1:]])
            values.append(new.detach().requires_grad_())
        return values[0]

    modules = {name: core.get_submodule(name) for name in names}
    after = [(m, lambda module, args, output: other(output)) for m in modules.values()]
    with (
        running.own_pass(),
        running.hooked(after=after) if side == "output" else heads.hooked_head(modules, other),
        heads.hooked_head(heads.head_layers(core, structure.head)) as (_, outputs),
    ):
        output = running.scoring_run(core, structure.scoring)(images)
    if not structure.head.before_softmax:
        return values[0], logits_at(core, output, structure.logits, len(images))
    return values[0], _scored(structure.head, outputs, output)


def _scored(head: heads.HeadLayers, outputs: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The logits, which are those before a softmax if the network returns one."""
    return of_two_classes(outputs[head.names[0]].flatten(1)) if head.before_softmax else logits


def _tolerance(logits: Tensor) -> float:
    return ROUNDED if logits.dtype in heads.HALF else EXACT


def _affine(module: nn.Module, x: Tensor, logits: Tensor, is_normalised: bool) -> Head | None:
    """The map that these logits `[N, K]` and their gradients show, computed in float64.

    Of an affine score w f + b, the gradient is w for every feature f.
    """
    u = heads.flat_feature(module, x).detach().cpu().double()
    length = u.norm(dim=1, keepdim=True) if is_normalised else u.new_ones(len(x), 1)
    u = u / length

    def agrees(found: Tensor, wanted: Tensor) -> bool:
        return bool((found - wanted).abs().max() <= _tolerance(logits) * found.abs().max())

    def solved(scores: Tensor) -> tuple[Tensor, Tensor] | None:
        (gradient,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
        g = heads.flat_feature(module, gradient).detach().cpu().double()
        g *= x[0].numel() / u.shape[1]
        s = scores.detach().cpu().double()
        if not is_normalised:
            w = g.mean(0)
            return (w, (s - u @ w).mean()) if agrees(g, w) else None
        # Of the score w u + b, the gradient is (w - (w u) u) / |f|: `sums` are w + b u.
        sums, apart = length * g + s.unsqueeze(1) * u, u - u.mean(0)
        b = ((sums - sums.mean(0)) * apart).sum() / apart.square().sum()
        w = (sums - b * u).mean(0)
        return (w, b) if agrees(sums, w + b * u) else None

    mixture = torch.linspace(0.5, 1.5, logits.shape[1], dtype=torch.float32, device=logits.device)
    if solved(logits @ mixture.to(logits)) is None:
        return None  # a mixture of all classes shows it at once
    rows = [row for k in range(logits.shape[1]) if (row := solved(logits[:, k])) is not None]
    if len(rows) < logits.shape[1]:
        return None
    weight, bias = (torch.stack(parts) for parts in zip(*rows, strict=True))
    if not agrees(u @ weight.T + bias, logits.detach().cpu().double()):
        return None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return Head(weight.to(logits.device, dtype), bias.to(logits.device, dtype))
