"""Calibrate a detector: score ID images, group them, and keep each once, with those before."""

import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from fusenorm_openood.errors import CalibrationError, ConfigError, DataError, warn
from fusenorm_openood.forward.batches import LABELS, noting
from fusenorm_openood.forward.experts import BatchScores
from fusenorm_openood.forward.recorded import RecordedLoader, Scored, collect
from fusenorm_openood.method.calibration import (
    PREDICTED,
    Calibrated,
    Calibration,
    GroupsOf,
    group_names,
    listed,
)
from fusenorm_openood.method.statistics import ROUNDING
from fusenorm_openood.storage.urls import Url

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
    how = images, detector.rows, progress, "calibrate", read
    scored = collect(detector.net, detector.scoring, *how)
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


def repeated_columns(known: NDArray[Any], new: NDArray[Any]) -> int:
    """Number of columns of `[L, M]` that equal one of `[L, N]` up to float32 rounding."""
    from scipy.spatial import cKDTree  # takes long to import

    scale = known.std(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    distance, _ = cKDTree((known / scale).T).query((new / scale).T)
    return int(np.count_nonzero(distance < 1e-4 * np.sqrt(len(known))))


def distinct_columns(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Numbers of the first of all columns of `[L, N]` that are equal up to float32 rounding."""
    from scipy.sparse import coo_matrix  # take long to import
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    scores = scores.astype(np.float64)
    spread, largest = scores.std(axis=1), abs(scores).max(axis=1)
    rounding = 1e-4 * spread + ROUNDING * largest + np.finfo(np.float32).tiny
    columns = (scores / rounding[:, None]).T
    # Equal columns fall into few cells, so that the number of pairs stays small.
    _, first, cell = np.unique(columns.round(), axis=0, return_index=True, return_inverse=True)
    pairs = cKDTree(columns[first]).query_pairs(1.0, p=np.inf, output_type="ndarray")
    links = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(len(first), len(first)))
    group = connected_components(links, directed=False)[1][cell.reshape(-1)]
    return np.unique(group, return_index=True)[1]


def projections(tensors: Iterable[Tensor]) -> NDArray[np.float64]:
    """Numbers `[4, B]` that tell images apart, from tensors `[B, ...]` of them."""
    flat = torch.cat([t.detach().flatten(1).cpu().double() for t in tensors], dim=1).numpy()
    drawn: NDArray[np.float64] = np.random.default_rng(0).normal(size=(4, flat.shape[1])) @ flat.T
    return drawn


def check_apart(fit: Any, calibration: Any) -> None:
    """Raise CalibrationError if an image is in both of two data sets or lists of files."""
    fitted = set(_items(fit))
    both = [item for item in _items(calibration) if item in fitted]
    if both:
        example = f", for example {both[0]}" if isinstance(both[0], str) else ""
        raise CalibrationError(
            f"{len(both)} calibration images are among those that the detector is fitted on"
            f"{example}: give ID images that it has not seen"
        )


def _items(data: Any) -> list[Any]:
    """What tells the images of a data set from others: their files, else their numbers in it."""
    if isinstance(data, Subset):
        items = _items(data.dataset)
        return [items[int(number)] for number in data.indices]
    files = getattr(data, "paths", data)
    if hasattr(data, "samples"):  # torchvision
        files = [sample[0] for sample in data.samples if isinstance(sample, tuple)]
    if isinstance(files, Sequence) and all(isinstance(file, str | Path | Url) for file in files):
        return [str(file if isinstance(file, Url) else os.path.realpath(file)) for file in files]
    return [(id(data), number) for number in range(len(data) if hasattr(data, "__len__") else 1)]


def data_of(loader: Iterable[Any]) -> Any:
    """The data set of a loader, or the loader if it has none."""
    dataset = getattr(loader, "dataset", None)
    return loader if dataset is None else dataset
