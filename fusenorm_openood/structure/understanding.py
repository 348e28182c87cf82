"""All that has to be known of a network before its images are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.method.posthoc import Head
from fusenorm_openood.structure.activations import checked_activation, is_activation
from fusenorm_openood.structure.affine import probe
from fusenorm_openood.structure.head import (
    HALF,
    HeadLayers,
    feature_of,
    flat_feature,
    has_quantised_weight,
    head_layers,
    kept_head,
    linear_head,
)
from fusenorm_openood.structure.hooks import own_pass
from fusenorm_openood.structure.modes import preserved_randomness, undisturbed
from fusenorm_openood.structure.outputs import logits_at, of_two_classes
from fusenorm_openood.structure.reading import Structure, read_structure, two_images
from fusenorm_openood.structure.recording import recorded
from fusenorm_openood.structure.repetition import Listened, repeated
from fusenorm_openood.structure.wrappers import network_errors, scoring_run, unwrapped


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
    with undisturbed(core), preserved_randomness(images.device), torch.no_grad():
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
