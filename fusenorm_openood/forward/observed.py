"""What is heard of images in one pass, live or recorded earlier."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.forward.batches import batches, not_finite
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.network.running import network_errors

Heard = tuple[Tensor, Tensor, Seen | None]  # scores [R, B], predictions [B], features and logits


class Listener(NamedTuple):
    """A pass over images.

    Attributes:
        listen: scores `[R, B]`, predicted classes `[B]`, and perhaps features and logits of images
            `[B, C, H, W]` on the network's device.
        what: all that its answers depend on besides the network and the images, in terms of JSON.
        restore: what is to become of an answer that was recorded; None = nothing.
        taken: of another pass, given its `what`, how its answers contain those of this one; None =
            they do not.
    """

    listen: Callable[[Tensor], Heard]
    what: Mapping[str, Any]
    restore: "Change | None" = None
    taken: "Callable[[Mapping[str, Any]], Change | None]" = lambda what: None


class Observed(NamedTuple):
    """What was heard of `B` images.

    Attributes:
        rows: scores `[R, B]`.
        pred: predicted classes `[B]`.
        label: labels `[B]`, -1 for images without a label.
        seen: features and logits, if the pass gives them.
        images: the images `[B, C, H, W]`, unless the pass was recorded.
    """

    rows: Tensor
    pred: Tensor
    label: NDArray[np.int64]
    seen: Seen | None
    images: Tensor | None = None


Change = Callable[[Observed], Observed]


class Recorder(ABC):
    """A loader that keeps what is heard of its images, so that no image is heard twice."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The batches of its images."""

    @property
    @abstractmethod
    def first(self) -> Tensor:
        """At least one of its images `[B, C, H, W]`."""

    @abstractmethod
    def prepare(self, net: nn.Module, listener: Listener, progress: bool) -> None:
        """Hear this process's share of the images, without waiting for others."""

    @abstractmethod
    def observed(
        self, net: nn.Module, listener: Listener, progress: bool, desc: str
    ) -> Iterator[Observed]:
        """What a listener hears of the images, in order."""


def finite_feature(heard: Observed) -> Tensor:
    """The features `[B, D]` of a pass that gives them.

    Raises:
        NonFiniteError: one of them is not finite.
    """
    assert heard.seen is not None
    feature = heard.seen.feature
    finite = feature.isfinite().all(dim=1)
    if not finite.all():
        image = int((~finite).nonzero()[0, 0])
        raise not_finite(heard.images, image, "a penultimate feature that is not finite")
    return feature


def observed(
    net: nn.Module,
    loader: Iterable[Any],
    listener: Listener,
    progress: bool = False,
    desc: str = "",
) -> Iterator[Observed]:
    """What a listener hears of a loader's images, batch by batch.

    Raises:
        DataError: an unknown kind of batch.
        NetworkError: the network fails on images.
    """
    if isinstance(loader, Recorder):
        recorded = loader.observed(net, listener, progress, desc)
        yield from recorded if listener.restore is None else map(listener.restore, recorded)
        return
    for images, labels in batches(loader, progress, desc):
        with network_errors(net, images):
            rows, pred, seen = listener.listen(moved(net, images))
        label = np.full(len(images), -1) if labels is None else labels
        yield Observed(rows, pred, label, seen, images)
