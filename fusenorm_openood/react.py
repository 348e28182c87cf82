"""ReAct: clipping the penultimate feature at a percentile of its ID activations."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward import Pass, apply_head, device_of, final_linear, forward_pass
from fusenorm_openood.scoring import batches, not_finite
from fusenorm_openood.statistics import ActivationSample
from fusenorm_openood.taps import undisturbed


def react_thresholds(
    net: nn.Module, loader: Iterable[Any], percentiles: Sequence[float], progress: bool = False
) -> dict[float, float]:
    """Percentiles of the penultimate activations of ID images, where ReAct clips; in one pass.

    Raises:
        TapError: a network whose logits are not those of a final linear layer.
        NonFiniteError: an image, or the feature it gives, that is not finite.
        DataError: a loader without images.

    Source: Sun et al., NeurIPS 2021.
    """
    if not percentiles:
        return {}
    sample = ActivationSample()
    with undisturbed(net), torch.no_grad():
        for images, _ in batches(loader, progress, "ReAct"):
            done = forward_pass(net, images.to(device_of(net), non_blocking=True))
            if done.feature is None:
                raise _no_head(net)
            feature = done.feature.float().cpu().numpy()
            if not np.isfinite(feature).all():
                image = int(np.argwhere(~np.isfinite(feature))[0, 0])
                raise not_finite(images, image, "a penultimate feature that is not finite")
            if sample.is_empty and not _head_gives(net, done):
                raise _no_head(net)
            sample.update(feature)
    return {q: sample.percentile(q) for q in percentiles}


def react_logits(net: nn.Module, done: Pass, threshold: float | None) -> Tensor:
    """Logits of a pass, its penultimate feature clipped at the threshold, if there is one."""
    if threshold is None:
        return done.logits
    head = final_linear(net)
    if head is None or done.feature is None:
        raise _no_head(net)
    return apply_head(head, done.feature.clamp(max=threshold))


def _head_gives(net: nn.Module, done: Pass) -> bool:
    """Whether the final linear layer, and nothing behind it, makes the logits."""
    head = final_linear(net)
    return (
        head is not None
        and done.feature is not None
        and done.logits.shape == (len(done.feature), head.out_features)
        and torch.allclose(apply_head(head, done.feature), done.logits, rtol=1e-3, atol=1e-4)
    )


def _no_head(net: nn.Module) -> TapError:
    return TapError(
        f"ReAct needs a final linear layer that gives the logits, and "
        f"{type(net).__name__} has none: choose react_percentile=None"
    )
