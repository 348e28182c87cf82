"""Samples of and sums over a stream of ID images, in bounded memory."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.method.posthoc import POSTHOC, Posthoc, Seen, State
from fusenorm_openood.method.seen import no_sums

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


BLOCK = 1000  # images


class BlockSums:
    """What the fits of post-hoc experts sum over a stream of ID images, in bounded memory.

    Images are summed in blocks of `BLOCK`, and these in their order, so that the last bit does not
    depend on the batches, nor on which process has heard which images.
    """

    def __init__(self, experts: Iterable[Posthoc]) -> None:
        self._sums: dict[Posthoc, State] = {e: {} for e in experts}
        self._summing = [e for e in self._sums if POSTHOC[e.name].sums is not no_sums]
        self._block: list[tuple[Tensor, ...]] = []
        self._count = 0

    def add(self, seen: Seen, labels: Tensor) -> None:
        """Add the images of one batch, and their classes `[B]`."""
        if not self._summing:
            return
        batch = tuple(t.detach().cpu() for t in (*seen, labels))
        start = 0
        while start < len(labels):
            part = tuple(t[start : start + BLOCK - self._count].clone() for t in batch)
            self._block.append(part)
            self._count += len(part[0])
            start += len(part[0])
            if self._count == BLOCK:
                self._sum_up()

    def of(self, expert: Posthoc) -> State:
        """The sums of an expert over all images so far, after which there come no more."""
        if self._block:
            self._sum_up()
        return self._sums[expert]

    def _sum_up(self) -> None:
        feature, logits, labels = map(torch.cat, zip(*self._block, strict=True))
        self._block, self._count = [], 0
        for expert in self._summing:
            total = self._sums[expert]
            for name, value in POSTHOC[expert.name].sums(Seen(feature, logits), labels).items():
                total[name] = total[name].add_(value) if name in total else value
