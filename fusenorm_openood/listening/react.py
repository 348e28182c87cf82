"""ReAct: clipping the penultimate feature at a percentile of its ID activations."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import DataError, TapError
from fusenorm_openood.listening.batches import not_finite
from fusenorm_openood.listening.observed import Heard, Listener, observed
from fusenorm_openood.listening.passes import Pass, apply_head, forward_pass
from fusenorm_openood.method.posthoc import Head, Seen
from fusenorm_openood.networks.lazy import LazyNetwork
from fusenorm_openood.structure.head import linear_head
from fusenorm_openood.structure.modes import undisturbed
from fusenorm_openood.structure.reading import Structure
from fusenorm_openood.structure.wrappers import unwrapped


def react_thresholds(
    net: nn.Module,
    structure: Structure,
    loader: Iterable[Any],
    percentiles: Sequence[float],
    progress: bool = False,
) -> dict[float, float]:
    """ReAct's thresholds: percentiles of the penultimate activations of ID images, in one pass.

    Raises:
        TapError: the network has no layers that make its logits.
        NonFiniteError: an image or its feature is not finite.
        DataError: the loader gives no images.

    Source: Sun et al., NeurIPS 2021.
    """
    if not percentiles:
        return {}
    sample = ActivationSample()
    for heard in observed(net, loader, _activations(net, structure), progress, "ReAct"):
        assert heard.seen is not None
        activations = heard.seen.feature.float().cpu().numpy()
        if not np.isfinite(activations).all():
            image = int(np.argwhere(~np.isfinite(activations))[0, 0])
            raise not_finite(heard.images, image, "a penultimate feature that is not finite")
        sample.update(activations)
    return {q: sample.percentile(q) for q in percentiles}


def _activations(net: nn.Module, structure: Structure) -> Listener:
    """A pass that gives the activations as features."""

    def listen(images: Tensor) -> Heard:
        with undisturbed(unwrapped(net)), torch.no_grad():
            done = forward_pass(net, images, structure)
        if done.activations is None:
            raise _no_head(net)
        return done.norms, done.pred, Seen(done.activations, done.logits[:, :0])

    return Listener(listen, {"activations": True})


def react_logits(
    net: nn.Module, structure: Structure, images: Tensor, done: Pass, threshold: float | None
) -> Tensor:
    """Logits of a pass over images, with its penultimate feature clipped at the threshold, if any.

    The layers that make the logits are applied once more, and the whole network where the logits
    are not their sum.
    """
    if threshold is None:
        return done.logits
    if done.feature is None:
        raise _no_head(net)
    if not structure.head.is_linear:
        return forward_pass(net, images, structure, threshold=threshold).logits
    core, names = unwrapped(net), structure.head.names
    clipped = done.feature.clamp(max=threshold)
    if structure.head.shares == (1.0,) and isinstance(core.get_submodule(names[0]), nn.Linear):
        return apply_head(core.get_submodule(names[0]), clipped)
    weight, bias = head_of(net, structure)
    with torch.autocast(clipped.device.type, enabled=False):
        return F.linear(clipped.float(), weight.float(), bias.float())


def head_of(net: nn.Module, structure: Structure) -> Head:
    """Weight and bias of the network's logits as a linear function of its feature.

    Raises:
        TapError: the logits do not come from layers with a weight matrix.
    """
    if isinstance(net, LazyNetwork) and net.known is not None and net.known.head is not None:
        head: Head = net.known.head
        return head
    layers = [unwrapped(net).get_submodule(name) for name in structure.head.names]
    found = linear_head(layers, structure.head.shares)
    if found is None:
        raise TapError(
            f"the logits of {type(net).__name__} do not come from a linear layer, whose weights "
            "an expert needs: set strong=['output']"
        )
    return found


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


def _no_head(net: nn.Module) -> TapError:
    return TapError(
        f"ReAct needs the layers that make the logits, and none was found in {type(net).__name__}: "
        "set react_percentile=None"
    )
