"""ReAct's thresholds: percentiles of the penultimate activations of ID images."""

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from fusenorm_openood.forward.batches import not_finite
from fusenorm_openood.forward.experts import BatchScores, Experts, Scoring
from fusenorm_openood.forward.recorded import RecordedLoader, batch_scores
from fusenorm_openood.forward.samples import Sample

MEMORY = 2**26  # bytes: percentiles are exact up to 2^24 activations


def react_thresholds(
    scoring: Scoring, loader: Iterable[Any], progress: bool = False
) -> dict[float, float]:
    """Percentiles of the activations of ID images at which experts clip, in one pass.

    Beyond `MEMORY`, they are those of an even sample of the images.

    Raises:
        TapError: the network has no layers that make its logits.
        NonFiniteError: an image or its feature is not finite.

    Source: Sun et al., NeurIPS 2021.
    """
    percentiles = scoring.experts.percentiles
    if not percentiles:
        return {}
    experts = Experts()
    # A recorded pass serves the other experts, too, unless these wait for the thresholds.
    if isinstance(loader, RecordedLoader) and all(
        score.clip_percentile is None for score in scoring.by_network
    ):
        experts = replace(scoring.experts, scores=tuple(scoring.by_network))
    is_linear = scoring.structure.head.is_linear
    features = replace(scoring, experts=experts, features="all" if is_linear else "activations")
    sample = Sample(inf, MEMORY)
    for batch in batch_scores(scoring.net, lambda first: features, loader, progress, "ReAct"):
        check_features(batch)
        sample.add(batch.features._replace(logits=batch.features.logits[:, :0]))
    values = sample.features.feature.numpy()
    return {q: float(np.percentile(values, q)) for q in percentiles}


def check_features(batch: BatchScores) -> None:
    """Raise NonFiniteError if a feature of a batch is not finite."""
    finite = batch.features.feature.isfinite().all(dim=1)
    if not finite.all():
        image = int((~finite).nonzero()[0, 0])
        raise not_finite(batch.images, image, "a penultimate feature that is not finite")
