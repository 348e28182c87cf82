"""All that has to be known of a network before its images are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.devices import moved
from fusenorm_openood.errors import TapError
from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.structure.affine import probe
from fusenorm_openood.structure.head import (
    HALF,
    HeadLayers,
    flat_feature,
    has_quantised_weight,
    head_layers,
    kept_head,
    linear_head,
)
from fusenorm_openood.structure.hooks import own_pass
from fusenorm_openood.structure.modes import preserved_randomness, undisturbed
from fusenorm_openood.structure.outputs import logits_at
from fusenorm_openood.structure.reading import Structure, read_structure, two_images
from fusenorm_openood.structure.wrappers import scoring_run, unwrapped


def understand(net: nn.Module, images: Tensor) -> Structure:
    """The structure of a network, with how its logits come from its head, and what mixes images.

    Three passes over at most two images, which also show whether the network can be listened to
    at all.

    Args:
        net: any network; it is left unchanged.
        images: a batch `[B, C, H, W]` that it accepts, on its device.

    Raises:
        TapError: it is no module, fails on the images, or returns no logits `[B, K]`.
    """
    core, structure, two = unwrapped(net), read_structure(net, images), two_images(images)
    with undisturbed(core), preserved_randomness(images.device), torch.no_grad():
        inputs, outputs, logits = _pass(core, structure, two)
        mixes = _mixes(core, structure, two, logits)
        layers = {name: core.get_submodule(name) for name in structure.head.names}
        head, affine = _understood_head(core, layers, inputs, outputs, logits), None
        if not (head.is_affine and len(head.names) == 1):
            tried = replace(structure, head=head._replace(feature=structure.head.feature))
            head, affine = probe(core, tried, two) or (head, None)
    return replace(structure, head=head, affine=affine, mixes=mixes)


def guess_structure(net: nn.Module) -> Structure | None:
    """The structure of a network at images of a size that it is likely to take, if one works.

    What it says of names holds for images of other sizes as well, but for stages, if the network
    leaves too few pixels of smaller images.

    Raises:
        TapError: it is no module, or runs without hooks.
    """
    core = unwrapped(net)
    for shape in likely_shapes(core):
        images = torch.zeros(2, *shape)
        images[:, :, ::3, ::2], images[1] = 1.0, 0.5
        try:
            return understand(net, moved(net, images))
        except Exception as error:
            if is_out_of_memory(error):
                raise
    return None


def likely_shapes(core: nn.Module) -> list[tuple[int, int, int]]:
    """Channels, height and width: what timm's and Hugging Face's networks say, then the usual."""
    declared: Any = (getattr(core, "default_cfg", None) or {}).get("input_size")
    config: Any = getattr(core, "config", None)
    size = getattr(config, "image_size", None)
    conv = next((m for m in core.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(config, "num_channels", None) or (conv.in_channels if conv else 3)
    patches: Any = getattr(getattr(core, "patch_embed", None), "img_size", None)
    likely = [(channels, *patches)] if isinstance(patches, tuple) and len(patches) == 2 else []
    likely += [tuple(declared)] if declared else []
    if isinstance(size, int):
        likely.append((channels, size, size))
    return [*likely, *((channels, s, s) for s in (64, 32, 224, 28))]


Tensors = Mapping[str, Tensor]


def _pass(core: nn.Module, structure: Structure, images: Tensor) -> tuple[Tensors, Tensors, Tensor]:
    """Inputs and outputs of the head's layers, and the logits."""
    layers = head_layers(core, structure.head)
    with own_pass(), kept_head(layers) as (inputs, outputs):
        output = scoring_run(core, structure.scoring)(images.clone())
    return inputs, outputs, logits_at(core, output, structure.logits, len(images))


def _mixes(core: nn.Module, structure: Structure, images: Tensor, logits: Tensor) -> bool:
    """Whether an image has other logits alone than beside another one."""
    try:
        alone = _pass(core, structure, images[:1])[2][0].float()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return True  # batch normalisation by a batch of one value per channel, for example
    beside = logits[0].float()
    if not (alone.isfinite().all() and logits.isfinite().all()):
        return False
    spread = float(logits.float().max() - logits.float().min())
    is_half = {logits.dtype, images.dtype} & set(HALF) or torch.is_autocast_enabled(
        images.device.type
    )
    rounding = 1e-2 if is_half else 1e-3
    return not torch.allclose(alone, beside, rtol=0, atol=rounding * spread + 1e-6)


def _understood_head(
    core: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Tensors,
    outputs: Tensors,
    logits: Tensor,
) -> HeadLayers:
    names = tuple(layers)
    equal = (1 / len(names),) * len(names) if names else ()
    known = HeadLayers(names, equal)
    if not torch.isfinite(logits).all():
        return known._replace(is_affine=bool(names))  # the error will be that of their scores
    single = outputs[names[0]].flatten(1) if len(names) == 1 else None
    if single is not None and single.shape == logits.shape and _is_softmax(single, logits):
        known, logits = HeadLayers(names, (1.0,), before_softmax=True), single
    if not known.before_softmax and _are_probabilities(logits):
        raise TapError(
            f"{type(core).__name__} returns probabilities, which are no logits: wrap it so that "
            "its forward returns what its softmax is applied to"
        )
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


def _is_softmax(before: Tensor, after: Tensor) -> bool:
    before, after = before.float(), after.float()
    possible = before.softmax(1), before.log_softmax(1)
    close = any(torch.allclose(after, p, rtol=1e-2, atol=1e-5) for p in possible)
    return close and not torch.equal(before, after)


def _are_probabilities(logits: Tensor) -> bool:
    total = logits.float().sum(1)
    return bool((logits >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-3))


def find_shares(
    sums: Sequence[Tensor], logits: Tensor, tolerance: float = 1e-3
) -> tuple[tuple[float, ...], bool]:
    """Factors with which tensors `[B, K]` add up to the logits, and whether they do exactly."""
    columns = torch.stack([part.flatten().double().cpu() for part in sums], dim=1)
    wanted = logits.flatten().double().cpu()
    if not columns.any():  # a head that is initialised to zero
        return (1 / len(sums),) * len(sums), not bool(wanted.any())
    found = torch.linalg.lstsq(columns, wanted.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    for plain in (1.0, 1 / len(sums)):  # one head, or a mean of several
        found[(found - plain).abs() < tolerance] = plain
    largest = float(wanted.abs().max())
    exact = torch.allclose(columns @ found, wanted, rtol=tolerance, atol=tolerance * largest)
    return tuple(found.tolist()), exact
