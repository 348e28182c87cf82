"""Calibrate a detector: score ID images, group them, and keep each once, with those before."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.detectors.loaders import Scored, collect
from fusenorm_openood.detectors.repeats import (
    check_apart,
    data_of,
    distinct_columns,
    projections,
    repeated_columns,
)
from fusenorm_openood.errors import CalibrationError, ConfigError, DataError, warn
from fusenorm_openood.forward.batches import LABELS, noting
from fusenorm_openood.forward.experts import BatchScores
from fusenorm_openood.forward.recorded import RecordedLoader, batch_scores
from fusenorm_openood.method.calibration import (
    PREDICTED,
    Calibrated,
    Calibration,
    GroupsOf,
    group_names,
    listed,
)

if TYPE_CHECKING:
    from fusenorm_openood.detectors.base import Detector

REPEATED = 0.1  # share of calibration images that may look like images of the fit


def calibration_of(
    detector: "Detector",
    loader: Iterable[Any],
    progress: bool,
    by: str | GroupsOf | None,
    least: int,
    merge: bool,
    newest: int | None,
    source: str | None,
) -> Calibration:
    """The calibration of a detector with the images of a loader; see `Detector.calibrate`."""
    for name, number in (("least", least), ("newest", newest)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be >= 1, got {number}")
    if merge and detector.other_network is not None:
        raise CalibrationError(
            "the calibration images were scored by other weights, and cannot be merged with "
            "new ones: calibrate without merge"
        )
    function = by if callable(by) else None
    by = f"{getattr(by, '__name__', type(by).__name__)}()" if callable(by) else by
    if function is not None and isinstance(loader, RecordedLoader):
        raise DataError(f"by={by} needs images, which a store lacks: leave out the store")
    before = detector.calibration_ if merge else None
    if before is not None:
        before.check_mergeable(by)
    fitted_on = detector.fit_data and detector.fit_data()
    if fitted_on is not None:
        check_apart(fitted_on, data_of(loader))
    new = _scored(detector, loader, progress, by, function, least, source)
    new = new if before is None else before.then(new)
    first = np.sort(distinct_columns(new.marks))
    if len(first) < len(new):
        warn(
            f"{len(new) - len(first)} of {len(new)} calibration images repeat others: "
            f"p-values and the guarantee are those of the {len(first)} distinct images"
        )
    new = new.keep(first if newest is None else first[-newest:])
    if pooled := new.pooled:
        names = detector.names_of_groups(new)
        few = f"{len(pooled)} of {len(new.names)} groups by {by} have fewer than {least} "
        if len(pooled) == len(new.names):
            warn(f"{few}calibration images, so all images are compared with all of them")
        else:
            warn(
                f"{few}calibration images, so theirs are compared with the {len(new.cells[-1])} of "
                f"{'such' if new.is_pooled else 'all'} groups, and nothing is promised for one of "
                f"them alone: {listed([names[number] for number in pooled])}"
            )
    return new


def _scored(
    detector: "Detector",
    loader: Iterable[Any],
    progress: bool,
    by: str | None,
    function: GroupsOf | None,
    least: int,
    source: str | None,
) -> Calibration:
    """The calibration with the images of a loader alone, also those that repeat others."""
    marks, given = list[NDArray[np.float64]](), list[str]()

    def read(batch: BatchScores) -> None:
        if len(detector.experts) == 1:  # two images may well have a single score in common
            marks.append(projections(batch.features if batch.images is None else [batch.images]))
        if function is not None and batch.images is not None:
            given.extend(group_names(function(batch.images, batch.pred.cpu().numpy())))

    noted = function is None and by not in (None, PREDICTED, *LABELS)
    images = noting(loader, str(by), given) if noted else loader
    batches = batch_scores(detector.net, detector.scoring, images, progress, "calibrate")
    scored = collect(batches, detector.rows, read)
    conf = detector.confidence(scored.experts).astype(np.float64)
    if (fit := detector.id_statistics_) is not None:
        layers = len(fit.layers)  # others may score the images of their fit in another way
        repeated = repeated_columns(fit.id_scores[:layers], scored.experts[:layers])
        if repeated > REPEATED * len(conf):
            raise CalibrationError(
                f"{repeated} of {len(conf)} calibration images are among those that the "
                "detector is fitted on: give ID images that it has not seen"
            )
    names, group = _groups(detector, scored, by, given)
    told = [scored.experts[: len(detector.experts)], *([np.hstack(marks)] if marks else [])]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    source = type(data_of(loader)).__name__ if source is None else source
    history = (Calibrated(now, len(conf), source),)
    stacked = np.vstack(told).astype(np.float64)
    return Calibration(conf, stacked, history, by, names, group, least, function)


def _groups(
    detector: "Detector", scored: Scored, by: str | None, given: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the groups, and the number of each image's group."""
    if by is None:
        return ("all",), np.zeros_like(scored.pred)
    if by == PREDICTED:
        return tuple(map(str, range(detector.scoring().structure.classes))), scored.pred
    if by in LABELS:
        if (scored.label < 0).any():
            raise DataError(f"by={by!r} needs a loader that gives labels >= 0")
        given = group_names(scored.label)
    if len(given) != len(scored.pred):
        count = len(scored.pred)
        raise DataError(f"{by} must give a group for each of {count} images, got {len(given)}")
    names, group = np.unique(given, return_inverse=True)
    return tuple(names.tolist()), group.astype(np.int64)
