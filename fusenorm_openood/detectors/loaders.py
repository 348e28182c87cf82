"""Scores of all images of a loader, and whether they are finite."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.batches import not_finite
from fusenorm_openood.forward.experts import BatchScores, Expert
from fusenorm_openood.method.scores.base import Score


class Scored(NamedTuple):
    """Results of a detector on `N` images.

    Attributes:
        conf: confidences `[N]`, larger = more in-distribution.
        pred: predicted classes `[N]`.
        label: labels `[N]` from the loader, -1 where it gives none.
        experts: scores of the experts `[L, N]`, larger = more in-distribution.
    """

    conf: NDArray[Any]
    pred: NDArray[np.int64]
    label: NDArray[np.int64]
    experts: NDArray[Any]


def collect(
    batches: Iterable[BatchScores],
    rows: Sequence[Expert],
    each: Callable[[BatchScores], None] | None = None,
    may_overflow: bool = False,
) -> Scored:
    """Scores `[L, N]` of experts, predictions and labels of all batches, without confidences.

    `each` is called with each batch whose scores are finite.

    Raises:
        DataError: there are no images.
        NonFiniteError: a score that is not finite; if these may overflow, an image that is not.
    """
    done: list[tuple[NDArray[Any], ...]] = []
    waiting: list[tuple[Tensor, BatchScores]] = []

    def read(matrix: Tensor, batch: BatchScores) -> None:
        experts = matrix.cpu().numpy()  # waits for the device
        check_finite(batch.images, experts, rows, may_overflow)
        if each is not None:
            each(batch)
        done.append((experts, batch.pred.cpu().numpy(), batch.label))

    for batch in batches:
        waiting.append((batch.matrix(rows), batch))
        # A GPU scores one batch while the next one is loaded and copied to it.
        if batch.pred.device.type == "cpu" or len(waiting) > 1:
            read(*waiting.pop(0))
    for left in waiting:
        read(*left)
    if not done:
        raise DataError("loader must give at least one image, got none")
    experts, pred, label = zip(*done, strict=True)
    pred, label = (np.concatenate(arrays).astype(np.int64) for arrays in (pred, label))
    return Scored(np.empty(0), pred, label, np.concatenate(experts, axis=1))


def check_finite(
    images: Tensor | None,
    scores: NDArray[Any],
    rows: Sequence[Expert],
    may_overflow: bool = False,
) -> None:
    """Raise NonFiniteError for a score of `[L, B]`, or, if these may overflow, an image that is."""
    if may_overflow:
        if images is not None and not (finite := images.flatten(1).isfinite().all(dim=1)).all():
            image = int((~finite).nonzero()[0, 0])
            raise not_finite(images, image, "scores that are not finite")
    elif not np.isfinite(scores).all():
        row, image = np.argwhere(~np.isfinite(scores))[0]
        expert = rows[row]
        name = expert.name if isinstance(expert, Score) else expert[0]
        what = f"the score {scores[row, image]} from expert {name!r}"
        raise not_finite(images, int(image), what)
