"""ReAct's thresholds: percentiles of the penultimate activations of ID images."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.observed import (
    Heard,
    Listener,
    Recorder,
    finite_feature,
    observed,
)
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.forward.react import no_head
from fusenorm_openood.forward.recording import recording, run_again
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure


def react_thresholds(
    net: nn.Module,
    structure: Structure,
    loader: Iterable[Any],
    panel: Panel,
    progress: bool = False,
) -> dict[float, float]:
    """Percentiles of the activations of ID images at which a panel's experts clip, in one pass.

    Raises:
        TapError: the network has no layers that make its logits.
        NonFiniteError: an image or its feature is not finite.
        DataError: the loader gives no images.

    Source: Sun et al., NeurIPS 2021.
    """
    if not panel.percentiles:
        return {}
    again = run_again(panel, structure) if isinstance(loader, Recorder) else Panel((), ())
    listener, sample = _activations(net, structure, again), ActivationSample()
    for heard in observed(net, loader, listener, progress, "ReAct"):
        sample.update(finite_feature(heard).float().cpu().numpy())
    return {q: sample.percentile(q) for q in panel.percentiles}


def _activations(net: nn.Module, structure: Structure, panel: Panel) -> Listener:
    """A pass that gives the activations as features, if possible that of a panel's other scores."""
    if structure.head.is_linear:
        kept = Panel((), ()) if panel.percentiles else panel
        return recording(net, structure, kept, Fitted(), features=True)

    def listen(images: Tensor) -> Heard:
        with eval_mode(unwrapped(net)), torch.no_grad():
            done = forward_pass(net, images, structure)
        if done.activations is None:
            raise no_head(net)
        return done.norms, done.pred, Seen(done.activations, done.logits[:, :0])

    return Listener(listen, {"activations": True})


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
