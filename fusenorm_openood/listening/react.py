"""ReAct: clipping the penultimate feature at a percentile of its ID activations."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.devices import device_of
from fusenorm_openood.errors import DataError, TapError
from fusenorm_openood.listening.batches import batches, not_finite
from fusenorm_openood.listening.modes import undisturbed
from fusenorm_openood.listening.passes import Pass, apply_head, final_linear, forward_pass


def react_thresholds(
    net: nn.Module, loader: Iterable[Any], percentiles: Sequence[float], progress: bool = False
) -> dict[float, float]:
    """ReAct's thresholds: percentiles of the penultimate activations of ID images, in one pass.

    Raises:
        TapError: the network's logits are not the output of a final linear layer.
        NonFiniteError: an image or its feature is not finite.
        DataError: the loader gives no images.

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
            if sample.is_empty and not head_gives(net, done):
                raise _no_head(net)
            sample.update(feature)
    return {q: sample.percentile(q) for q in percentiles}


def react_logits(net: nn.Module, done: Pass, threshold: float | None) -> Tensor:
    """Logits of a pass, with its penultimate feature clipped at the threshold, if any."""
    if threshold is None:
        return done.logits
    head = final_linear(net)
    if head is None or done.feature is None:
        raise _no_head(net)
    return apply_head(head, done.feature.clamp(max=threshold))


class ActivationSample:
    """Percentiles of a stream of features, in bounded memory.

    Exact up to `limit` values; beyond that, from an even sample: every second, fourth, ... image.
    """

    def __init__(self, limit: int = 2**24) -> None:
        self.limit = limit
        self._kept: list[NDArray[np.float32]] = []
        self._values = self._images = 0
        self._stride = 1

    @property
    def is_empty(self) -> bool:
        return self._images == 0

    def update(self, feature: NDArray[np.float32]) -> None:
        """Add the features `[B, D]` of one batch."""
        kept = feature[-self._images % self._stride :: self._stride].copy()
        self._images += len(feature)
        self._kept.append(kept)
        self._values += kept.size
        while self._values > self.limit and self._values > feature.shape[1]:
            self._stride *= 2
            halved = np.concatenate(self._kept)[::2].copy()
            self._kept, self._values = [halved], halved.size

    def percentile(self, q: float) -> float:
        """The q-th percentile, with q in [0, 100], of all values in the sample."""
        if self._values == 0:
            raise DataError(
                "ReAct needs at least one ID image, got none: fit on a loader that gives images"
            )
        return float(np.percentile(np.concatenate(self._kept), q))


def head_gives(net: nn.Module, done: Pass) -> bool:
    """Whether the logits are the unchanged output of the final linear layer."""
    head = final_linear(net)
    return (
        head is not None
        and done.feature is not None
        and done.logits.shape == (len(done.feature), head.out_features)
        and torch.allclose(
            apply_head(head, done.feature), done.logits, rtol=1e-3, atol=1e-4, equal_nan=True
        )
    )


def _no_head(net: nn.Module) -> TapError:
    return TapError(
        f"ReAct needs a final linear layer that returns the logits, which {type(net).__name__} "
        "lacks: set react_percentile=None"
    )
