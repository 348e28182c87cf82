"""Fit experts on ID images, in bounded memory, and tell how many images that takes."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.errors import warn
from fusenorm_openood.forward.batches import number_of_images
from fusenorm_openood.forward.experts import BatchScores, Experts, Fitted, Scoring
from fusenorm_openood.forward.given import check_features
from fusenorm_openood.forward.recorded import RecordedLoader, collect
from fusenorm_openood.method.scores.base import Features, Head, LogitScore, Score, State
from fusenorm_openood.method.statistics import trust

LEAST = 20  # images, with which the 5th percentile lies among the scores
SHORT = 0.9  # a fit on a tenth fewer images than are enough is nearly as good
LIMIT = 10_000  # images
MEMORY = 2**30  # bytes
BLOCK = 1000  # images
ACTIVATIONS = 2**26  # bytes: percentiles are exact up to 2^24 activations


def fit_experts(
    scoring: Scoring,
    loader: Iterable[Any],
    progress: bool,
    desc: str = "fit",
    least: int = LEAST,
    by_label: bool = False,
    may_overflow: bool = False,
) -> tuple[Fitted, BatchScores]:
    """What experts fit on ID images, and the scores of these.

    The loader is read once, and once more before if ReAct needs a threshold.

    With post-hoc scores, only an even sample of at most `LIMIT` images is returned, with their
    features: they are KNN's neighbours. Means and covariances are those of all images. For the
    post-hoc scores themselves, see `leave_one_out`.

    With `by_label`, a class is that of the label, where there is one, instead of the predicted one,
    and only memory limits the sample: OpenOOD's way for a single score.
    """
    is_counted = warn_if_few(scoring, loader, least)
    posthoc = [score for score in scoring.experts.scores if not isinstance(score, LogitScore)]
    others = tuple(score for score in scoring.experts.scores if score not in posthoc)
    fitted = Fitted(react_thresholds(scoring, loader, progress))
    first = replace(
        scoring,
        experts=replace(scoring.experts, scores=others),
        fitted=fitted,
        features="all" if any(score.needs_feature for score in posthoc) else "",
    )
    sample, sums = Sample(math.inf if by_label else LIMIT), BlockSums(posthoc)

    def add(batch: BatchScores) -> None:
        labels = batch.pred.cpu()  # with true ones, the images of the fit would score too high
        if by_label:
            check_features(batch)
            given = torch.from_numpy(batch.label)
            labels = torch.where(given < 0, labels, given)
        sample.add(batch.features)
        sums.add(batch.features, labels)

    rows = list(first.experts)
    each = add if posthoc else None
    how = loader, rows, progress, desc, each, may_overflow
    scored = collect(scoring.net, lambda _: first, *how)
    if not is_counted:
        warn_if_few(scoring, loader, least, len(scored.pred))
    experts, pred = torch.from_numpy(scored.experts), torch.from_numpy(scored.pred)
    if not posthoc:
        none = experts.new_empty(len(pred), 0)
        scores = dict(zip(rows, experts, strict=True))
        return fitted, BatchScores(scores, pred, Features(none, none), scored.label)
    head = scoring.head(experts.device)
    fitted.states = {score: sums.fit(score, sample, head) for score in posthoc}
    drawn = sample.indices
    scores = dict(zip(rows, experts[:, drawn], strict=True))
    return fitted, BatchScores(scores, pred[drawn], sample.features, scored.label[drawn])


def try_experts(scoring: Scoring, images: Tensor) -> None:
    """Score a few images, so that what cannot work fails before a loader is read."""
    clips = dict.fromkeys(scoring.clips.values(), math.inf)
    replace(scoring, fitted=Fitted(clips)).run(images)


def leave_one_out(scoring: Scoring, batch: BatchScores) -> BatchScores:
    """Images of the fit with their post-hoc scores, see `Score.score_fit`, which tell its trust."""
    head, fitted = scoring.head(batch.pred.device), scoring.fitted
    scores = dict(batch.scores)
    for score, state in fitted.states.items():
        scores[score] = score(batch.features, head, state, batch.pred)
        if type(score).score_fit is not Score.score_fit:
            in_sample = score(batch.features, head, state)
            both = scores[score].numpy(), in_sample.numpy()
            fitted.trust[score] = trust(*both, score.shrinkage(state))
    return batch._replace(scores=scores)


def enough_for(percentile: float) -> int:
    """The number of images with which a percentile in [0, 100] lies among their scores.

    >>> enough_for(5), enough_for(1), enough_for(0)
    (20, 100, 20)
    """
    return max(LEAST, math.ceil(100 / percentile - 1e-6)) if percentile else LEAST


def warn_if_few(
    scoring: Scoring, loader: Iterable[Any], least: int = LEAST, images: int | None = None
) -> bool:
    """Warn if a loader has fewer images than a fit needs; whether their number is known.

    It is `images`, or what the loader tells without being read.
    """
    images = number_of_images(loader) if images is None else images
    posthoc = [score for score in scoring.experts.scores if not isinstance(score, LogitScore)]
    classes, features = scoring.structure.classes, scoring.width if posthoc else 0
    needs = {"percentiles of the scores": least}
    for score in posthoc:
        count = score.images_needed(features, classes)
        needs[f"{score.name} with {classes} classes and {features} features"] = count
    few = [what for what, count in needs.items() if images is not None and images < SHORT * count]
    if few:
        warn(
            f"{images} ID images are too few for {', '.join(few)}: fit on at least "
            f"{max(needs.values())}"
        )
    return images is not None


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
    sample = Sample(math.inf, ACTIVATIONS)

    def add(batch: BatchScores) -> None:
        check_features(batch)
        sample.add(batch.features._replace(logits=batch.features.logits[:, :0]))

    collect(scoring.net, lambda first: features, loader, [], progress, "ReAct", add)
    values = sample.features.feature.numpy()
    return {q: float(np.percentile(values, q)) for q in dict.fromkeys(scoring.clips.values())}
