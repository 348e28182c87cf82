"""Sums over a stream of ID images, whatever the batches that they come in."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fusenorm_openood.method.posthoc import POSTHOC, Posthoc, Seen, State
from fusenorm_openood.method.seen import no_sums

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
