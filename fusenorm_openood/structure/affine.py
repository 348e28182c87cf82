"""The affine map from a feature to the logits, where it is not that of a layer's own weights.

Cosine heads, adapters beside or inside the final layer, masked weights, a single logit, a choice of
classes: the map is read from gradients, and tried on other features than those of images.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.method.posthoc import Head
from fusenorm_openood.structure.head import (
    HALF,
    HeadLayers,
    first_given,
    flat_feature,
    head_layers,
    kept_head,
)
from fusenorm_openood.structure.hooks import hooked, own_pass
from fusenorm_openood.structure.outputs import logits_at
from fusenorm_openood.structure.reading import Structure
from fusenorm_openood.structure.wrappers import scoring_run


class _Map(NamedTuple):
    """Scores `w x + b` of a feature x `[D]`, in float64."""

    w: Tensor
    b: Tensor


def probe(core: nn.Module, structure: Structure, images: Tensor) -> tuple[HeadLayers, Head] | None:
    """The head at `structure.head.feature`, and the logits as an affine function of this feature.

    The function is of the feature itself, or else of the feature divided by its length, of which
    the logits of a cosine head are an affine function. None if it is neither.

    Args:
        core: a network in evaluation mode.
        structure: how it is built; `head.feature` is where the feature may be.
        images: some that it accepts.
    """
    if not structure.head.feature:
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return _probed(core, structure, images)
    except (RuntimeError, NotImplementedError) as error:  # of layers without a gradient
        if is_out_of_memory(error):
            raise
        return None


def _probed(
    core: nn.Module, structure: Structure, images: Tensor
) -> tuple[HeadLayers, Head] | None:
    x, logits = _pass(core, structure, _noise(images))
    module = core.get_submodule(structure.head.feature[0])
    feature = _on_cpu(flat_feature(module, x))
    tolerance = 3e-2 if logits.dtype in HALF else 1e-3

    def gradients(scores: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
        return _on_cpu(flat_feature(module, found)) * (found[0].numel() / feature.shape[1])

    # A mixture of all classes shows at once whether the logits are affine.
    mixed = logits @ torch.linspace(0.5, 1.5, logits.shape[1]).to(logits)
    for is_normalised in (False, True):
        given = _on_cpu(mixed), feature, gradients(mixed), is_normalised, tolerance
        if _solved(*given) is None:
            continue
        found = [
            _solved(_on_cpu(column), feature, gradients(column), is_normalised, tolerance)
            for column in logits.unbind(1)
        ]
        maps = [each for each in found if each is not None]
        if len(maps) < len(found):
            continue
        head = Head(torch.stack([m.w for m in maps]), torch.stack([m.b for m in maps]))
        unit = feature / feature.norm(dim=1, keepdim=True)
        if not _close(head(unit if is_normalised else feature), _on_cpu(logits), tolerance):
            continue
        dtype = torch.promote_types(logits.dtype, torch.float32)
        kept = Head(*(t.to(images.device, dtype) for t in head))
        names, shares = structure.head.names, structure.head.shares
        before = structure.head.before_softmax
        how = structure.head.feature, is_normalised
        return HeadLayers(names, shares, True, before, True, *how), kept
    return None


def _solved(
    scores: Tensor, feature: Tensor, gradients: Tensor, is_normalised: bool, tolerance: float
) -> _Map | None:
    """The affine map with these scores `[N]` and gradients `[N, D]`, None if there is none.

    With u the feature divided by its length |f|, and a score w u + b, the gradient is
    (w - (w u) u) / |f|: |f| times it, plus the score times u, is w + b u.
    """
    if not is_normalised:
        w = gradients.mean(0)
        b = (scores - feature @ w).mean()
        return _Map(w, b) if _close(gradients, w, tolerance) else None
    length = feature.norm(dim=1, keepdim=True)
    unit = feature / length
    sums = length * gradients + scores.unsqueeze(1) * unit
    apart, differing = unit - unit.mean(0), sums - sums.mean(0)
    b = (differing * apart).sum() / apart.square().sum()
    w = (sums - b * unit).mean(0)
    return _Map(w, b) if _close(sums, w + b * unit, tolerance) else None


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * found.abs().max())


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _noise(like: Tensor) -> Tensor:
    """Four rows of standard normal values, always the same, in the shape of others' rows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *like.shape[1:], generator=generator, dtype=torch.float32).to(like)


def _other_values(x: Tensor) -> Tensor:
    """For four rows: the first one, its negative, and noise that is smaller and larger."""
    factors = x.new_tensor([0.3, 3.0]).view(-1, *[1] * (x.ndim - 1))
    return torch.cat([x[:1], -x[:1], x[:1].abs().mean() * factors * _noise(x)[:2]])


def _pass(core: nn.Module, structure: Structure, images: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor that holds the feature, with a graph from there to the logits."""
    name, side = structure.head.feature
    module, kept = core.get_submodule(name), list[Tensor]()

    def keep(x: Tensor) -> None:
        if not any(x is other for other in kept):  # in place, for all that read it
            with torch.no_grad():
                x.copy_(_other_values(x))
            kept.append(x if x.requires_grad else x.requires_grad_())

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(first_given(args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(output)

    hooks = {"before": [(module, before)]} if side == "input" else {"after": [(module, after)]}
    layers = head_layers(core, structure.head)
    with (
        torch.autocast(images.device.type, enabled=False),
        own_pass(),
        hooked(**hooks),
        kept_head(layers) as (_, outputs),
    ):
        output = scoring_run(core, structure.scoring)(images)
    if structure.head.before_softmax:
        return kept[-1], outputs[structure.head.names[0]].flatten(1)
    return kept[-1], logits_at(core, output, structure.logits, len(images))
