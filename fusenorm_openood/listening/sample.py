"""An even sample of a stream of images, in bounded memory."""

import numpy as np
import torch
from numpy.typing import NDArray

from fusenorm_openood.method.posthoc import Seen

LIMIT = 10_000  # images
MEMORY = 2**30  # bytes


class FeatureSample:
    """Features and logits of a stream of images.

    All of them up to `limit` images and `memory` bytes; beyond that an even sample: every second,
    fourth, ... image.
    """

    def __init__(self, limit: float = LIMIT, memory: float = MEMORY) -> None:
        self.limit, self.memory = limit, memory
        self._parts: list[Seen] = []
        self._images = self._count = 0
        self._stride = 1

    def add(self, seen: Seen) -> None:
        """Add the images of one batch."""
        first = -self._images % self._stride
        part = Seen(*(t.detach()[first :: self._stride].float().cpu() for t in seen))
        self._images += len(seen.logits)
        self._parts.append(part)
        self._count += len(part.logits)
        row = 4 * sum(t.shape[1] for t in part)
        while self._count > max(1, min(self.limit, self.memory // max(row, 1))):
            self._stride *= 2
            halved = Seen(*(t[::2].clone() for t in self.seen))
            self._parts, self._count = [halved], len(halved.logits)

    @property
    def seen(self) -> Seen:
        """Features `[N, D]` and logits `[N, K]` of the images in the sample, on the CPU."""
        features, logits = zip(*self._parts, strict=True)
        return Seen(torch.cat(features), torch.cat(logits))

    @property
    def indices(self) -> NDArray[np.int64]:
        """Which images of the stream are in the sample: `[N]`."""
        return np.arange(0, self._images, self._stride, dtype=np.int64)
