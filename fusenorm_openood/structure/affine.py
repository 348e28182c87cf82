"""The affine map from a feature to the logits, where it is not that of a layer's own weights.

Cosine heads, adapters inside or beside the final layer, masked weights, a single logit, a choice of
classes: the map is read from gradients at features other than those of images.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.devices import full_precision
from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.method.posthoc import Head
from fusenorm_openood.structure.head import HALF, HeadLayers, flat_feature, head_layers, kept_head
from fusenorm_openood.structure.hooks import hooked, own_pass
from fusenorm_openood.structure.outputs import logits_at, of_two_classes
from fusenorm_openood.structure.reading import Structure
from fusenorm_openood.structure.wrappers import scoring_run


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
            x, logits = _pass(core, structure, torch.cat([images, images]))
            for is_normalised in (False, True):
                found = _affine(core.get_submodule(head.feature[1]), x, logits, is_normalised)
                if found is not None:
                    kept = head._replace(is_linear=True, is_affine=True)
                    return kept._replace(is_normalised=is_normalised), found
    except Exception as error:  # a layer without a gradient, or one that checks its input
        if is_out_of_memory(error):
            raise
    return None


def _pass(core: nn.Module, structure: Structure, images: Tensor) -> tuple[Tensor, Tensor]:
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
            return (w, (s - u @ w).mean()) if _close(g, w, tolerance) else None
        # Of the score w u + b, the gradient is (w - (w u) u) / |f|: `sums` are w + b u.
        sums, apart = length * g + s.unsqueeze(1) * u, u - u.mean(0)
        b = ((sums - sums.mean(0)) * apart).sum() / apart.square().sum()
        w = (sums - b * u).mean(0)
        return (w, b) if _close(sums, w + b * u, tolerance) else None

    mixture = torch.linspace(0.5, 1.5, logits.shape[1], dtype=torch.float32, device=logits.device)
    if solved(logits @ mixture.to(logits)) is None:
        return None  # a mixture of all classes shows it at once
    rows = [row for k in range(logits.shape[1]) if (row := solved(logits[:, k])) is not None]
    if len(rows) < logits.shape[1]:
        return None
    weight, bias = (torch.stack(parts) for parts in zip(*rows, strict=True))
    if not _close(u @ weight.T + bias, _on_cpu(logits), tolerance):
        return None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return Head(weight.to(logits.device, dtype), bias.to(logits.device, dtype))


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * found.abs().max())


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
