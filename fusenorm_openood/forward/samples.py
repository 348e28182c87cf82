"""Samples of and sums over a stream of ID images, in bounded memory; ReAct's percentiles."""

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.forward.experts import BatchScores, Experts, Scoring
from fusenorm_openood.forward.given import check_features
from fusenorm_openood.forward.recorded import RecordedLoader, collect
from fusenorm_openood.method.scores.base import Features, Head, Score, State

LIMIT = 10_000  # images
MEMORY = 2**30  # bytes
BLOCK = 1000  # images
ACTIVATIONS = 2**26  # bytes: percentiles are exact up to 2^24 activations


class Sample:
    """Features and logits of a stream of images.

    All of them up to `limit` images and `memory` bytes; beyond that an even sample: every second,
    fourth, ... image.
    """

    def __init__(self, limit: float = LIMIT, memory: float = MEMORY) -> None:
        self.limit, self.memory = limit, memory
        self._parts: list[Features] = []
        self._images = self._count = 0
        self._stride = 1

    def add(self, batch: Features) -> None:
        """Add the images of one batch."""
        first = -self._images % self._stride
        part = Features(*(t.detach()[first :: self._stride].float().cpu() for t in batch))
        self._images += len(batch.logits)
        self._parts.append(part)
        self._count += len(part.logits)
        row = 4 * sum(t.shape[1] for t in part)
        while self._count > max(1, min(self.limit, self.memory // max(row, 1))):
            self._stride *= 2
            halved = Features(*(t[::2].clone() for t in self.features))
            self._parts, self._count = [halved], len(halved.logits)

    @property
    def features(self) -> Features:
        """Features `[N, D]` and logits `[N, K]` of the images in the sample, on the CPU."""
        feature, logits = zip(*self._parts, strict=True)
        return Features(torch.cat(feature), torch.cat(logits))

    @property
    def indices(self) -> NDArray[np.int64]:
        """Which images of the stream are in the sample: `[N]`."""
        return np.arange(0, self._images, self._stride, dtype=np.int64)


class BlockSums:
    """What the fits of scores sum over a stream of ID images, in bounded memory.

    Images are summed in blocks of `BLOCK`, and these in their order, so that the last bit does not
    depend on the batches, nor on which process has scored which images.
    """

    def __init__(self, scores: Iterable[Score]) -> None:
        self._sums: dict[Score, State] = {score: {} for score in scores}
        self._summing = [score for score in self._sums if type(score).sums is not Score.sums]
        self._block: list[tuple[Tensor, ...]] = []
        self._count = 0

    def add(self, batch: Features, labels: Tensor) -> None:
        """Add the images of one batch, and their classes `[B]`."""
        if not self._summing:
            return
        tensors = tuple(t.detach().cpu() for t in (*batch, labels))
        start = 0
        while start < len(labels):
            part = tuple(t[start : start + BLOCK - self._count].clone() for t in tensors)
            self._block.append(part)
            self._count += len(part[0])
            start += len(part[0])
            if self._count == BLOCK:
                self._sum_up()

    def fit(self, score: Score, sample: Sample, head: Head) -> State:
        """The state of a score, after the last batch."""
        if self._block:
            self._sum_up()
        state = score.fit(self._sums.get(score, {}), sample.features, head)
        # Contiguous as in files, because the last bit of products depends on it.
        return {name: value.contiguous() for name, value in state.items()}

    def _sum_up(self) -> None:
        feature, logits, labels = map(torch.cat, zip(*self._block, strict=True))
        self._block, self._count = [], 0
        for score in self._summing:
            total = self._sums[score]
            for name, value in score.sums(Features(feature, logits), labels).items():
                total[name] = total[name].add_(value) if name in total else value


def react_thresholds(
    scoring: Scoring, loader: Iterable[Any], progress: bool = False
) -> dict[float, float]:
    """Percentiles of the activations of ID images at which experts clip, in one pass.

    Beyond `ACTIVATIONS`, they are those of an even sample of the images. NonFiniteError for a
    feature that is not finite.
    """
    if not scoring.clips:
        return {}
    experts = Experts()
    # A recorded pass serves the other experts, too, unless these wait for the thresholds.
    if isinstance(loader, RecordedLoader) and scoring.clips.keys().isdisjoint(scoring.by_network):
        experts = replace(scoring.experts, scores=tuple(scoring.by_network))
    is_linear = scoring.structure.head.is_linear
    features = replace(scoring, experts=experts, features="all" if is_linear else "activations")
    sample = Sample(inf, ACTIVATIONS)

    def add(batch: BatchScores) -> None:
        check_features(batch)
        sample.add(batch.features._replace(logits=batch.features.logits[:, :0]))

    collect(scoring.net, lambda first: features, loader, [], progress, "ReAct", add)
    values = sample.features.feature.numpy()
    return {q: float(np.percentile(values, q)) for q in dict.fromkeys(scoring.clips.values())}
