"""Fit experts on ID images, and tell how many images that takes."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusenorm_openood.errors import warn
from fusenorm_openood.forward import samples
from fusenorm_openood.forward.batches import number_of_images
from fusenorm_openood.forward.experts import BatchScores, Fitted, Scoring
from fusenorm_openood.forward.given import check_features
from fusenorm_openood.forward.recorded import collect
from fusenorm_openood.forward.samples import LIMIT, BlockSums, Sample
from fusenorm_openood.method.scores.base import Features, LogitScore, Score
from fusenorm_openood.method.statistics import trust

LEAST = 20  # images, with which the 5th percentile lies among the scores
SHORT = 0.9  # a fit on a tenth fewer images than are enough is nearly as good


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
    fitted = Fitted(samples.react_thresholds(scoring, loader, progress))
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
            fitted.trust[score] = trust(scores[score].numpy(), in_sample.numpy())
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
