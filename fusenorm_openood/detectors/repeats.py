"""Images that repeat each other, or those of the fit, told by their data sets and scores."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from fusenorm_openood.errors import CalibrationError
from fusenorm_openood.method.statistics import ROUNDING
from fusenorm_openood.storage.urls import Url


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
