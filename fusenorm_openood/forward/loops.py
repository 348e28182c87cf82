"""Score all images of a loader, live or recorded earlier."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from fusenorm_openood.forward.batches import batches
from fusenorm_openood.forward.experts import BatchScores, Scoring
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.network.running import network_errors


class Recorder(ABC):
    """A loader that keeps what a forward pass gives, so that no image is scored twice."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The batches of its images."""

    @property
    @abstractmethod
    def first(self) -> Tensor:
        """At least one of its images `[B, C, H, W]`."""

    @abstractmethod
    def prepare(self, scoring: Scoring, progress: bool) -> None:
        """Score this process's share of the images, without waiting for other processes."""

    @abstractmethod
    def run(self, scoring: Scoring, progress: bool, desc: str) -> Iterator[BatchScores]:
        """What `Scoring.run` gives for all images, in order."""


def batch_scores(
    net: nn.Module,
    scoring_of: Callable[[Tensor | None], Scoring],
    loader: Iterable[Any],
    progress: bool = False,
    desc: str = "",
) -> Iterator[BatchScores]:
    """Scores of a loader's images, batch by batch.

    Args:
        net: the network.
        scoring_of: how images on the network's device are scored. They tell how the network is
            built; None of a recorded loader, for which this has to be known already.
        loader: any loader; see `batches`.
        progress, desc: the progress bar.

    Raises:
        DataError: an unknown kind of batch.
        NetworkError: the network fails on images.
    """
    if isinstance(loader, Recorder):
        scoring = scoring_of(None)
        yield from map(scoring.complete, loader.run(scoring, progress, desc))
        return
    for images, labels in batches(loader, progress, desc):
        with network_errors(net, images):
            on_device = moved(net, images)
            batch = scoring_of(on_device)(on_device)
        label = np.full(len(images), -1) if labels is None else labels
        yield batch._replace(label=label, images=images)
