"""Batches of images from any kind of loader."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fusenorm_openood.errors import DataError, RemoteError
from fusenorm_openood.forward.given import checked_images
from fusenorm_openood.method.calibration import group_names

Batch = TypeVar("Batch")
Labels = NDArray[np.int64]
# Keys of a batch that is a dict: OpenOOD's and DALI's, Hugging Face's, and other usual ones.
IMAGES = ("data", "pixel_values", "image", "images", "img")
LABELS = ("label", "labels", "target", "targets")


def batches(
    loader: Iterable[Any], progress: bool = False, desc: str = ""
) -> Iterator[tuple[Tensor, Labels | None]]:
    """Images `[B, C, H, W]` and class labels `[B]` of each batch, for any kind of loader.

    A batch is `(images, labels)`, images alone, or a dict (also as the only item of a list) with
    one of `IMAGES` and one of `LABELS` among its keys. Images are tensors or NumPy arrays. Labels
    are copied, for a view of what a worker process shares would hold a file open; they are None if
    the loader gives none, or something else than one integer per image. DataError for an unknown
    kind of batch, or other numbers of labels than of images.
    """
    total = number_of_images(loader) if progress else None
    with tqdm(total=total, desc=desc, unit=" images", disable=not progress, leave=False) as bar:
        for batch in without_traceback(loader):
            given, labels = _parts(batch)
            if isinstance(given, np.ndarray) and given.dtype.kind == "f":
                given = torch.from_numpy(given.astype(np.float32))
            images = checked_images(given)
            classes = _class_labels(labels, len(images))
            if len(images):
                yield images, classes
            bar.update(len(images))


def number_of_images(loader: Any) -> int | None:
    """The number of images of a loader, if it is known before they are read."""
    given: Any = loader.loader if isinstance(loader, Readings) else loader
    if isinstance(given, list | tuple):
        return sum(len(images) for images, _ in batches(given))
    if getattr(given, "batch_sampler", None) is not None and given.batch_size is None:
        return None
    try:
        return len(getattr(given, "sampler", None) or given.dataset)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def noting(loader: Iterable[Any], key: str, noted: list[str]) -> Iterator[Any]:
    """The batches of a loader, whose values under a key, one for each image, are noted as texts.

    DataError for a batch that is no dict with this key.
    """
    for batch in loader:
        given = batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch
        if not isinstance(given, Mapping) or key not in given:
            is_dict = isinstance(given, Mapping)
            found = f"the keys {', '.join(map(str, given))}" if is_dict else type(given).__name__
            raise DataError(
                f"images are grouped by {key!r}, which a loader must give as a key of batches that "
                f"are dicts, got {found}"
            )
        values = group_names(given[key])
        if len(values) != len(_parts(given)[0]):
            raise DataError(f"a batch must have one {key!r} for each image, got {len(values)}")
        noted += values
        yield batch


def _parts(batch: Any) -> tuple[Any, Any]:
    """Images and labels of a batch, None for what it lacks."""
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Mapping):
        images, labels = (
            next((batch[key] for key in keys if key in batch), None) for keys in (IMAGES, LABELS)
        )
        if images is None:
            raise DataError(
                f"a batch must have its images under one of the keys {', '.join(IMAGES)}, got the "
                f"keys {', '.join(map(str, batch)) or 'of an empty dict'}: rename one of them"
            )
        return images, labels
    if isinstance(batch, tuple | list) and batch:
        return batch[0], batch[1]
    return batch, None


def _class_labels(labels: Any, count: int) -> Labels | None:
    """A copy of labels `[B]` or `[B, 1]`, None unless they are one integer per image."""
    try:
        given = labels.detach().cpu() if isinstance(labels, Tensor) else labels
        array = np.asarray(given)
    except (RuntimeError, TypeError, ValueError):  # ragged, or numbers that NumPy does not have
        return None
    if array.dtype.kind not in "biuf" or array.shape[1:] not in ((), (1,)) or array.ndim == 0:
        return None
    if len(array) != count:
        raise DataError(
            f"a batch of {count} images has {len(array)} labels: give one label per image, or none"
        )
    with np.errstate(invalid="ignore"):
        classes = array.astype(np.int64)
    return classes.reshape(count) if np.array_equal(classes, array) else None


def without_traceback(loader: Iterable[Batch]) -> Iterator[Batch]:
    """A loader that raises an error from a worker process without the worker's traceback."""
    try:
        yield from loader
    except (DataError, RemoteError) as error:
        kind, sentence = type(error), str(error).rstrip().splitlines()[-1]
        raise kind(sentence.removeprefix(f"{kind.__module__}.{kind.__name__}: ")) from None


class Readings:
    """A loader whose first reading has begun, so that its first images `[B, C, H, W]` are known.

    DataError for an iterator, which can be read only once; a loader without images, or, at the end
    of a later reading, with another number of batches than before.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        of_python = type(loader).__module__ in ("builtins", "itertools")
        if of_python and iter(loader) is loader:
            raise _only_once(loader)
        self.loader = loader
        self._counts: list[int] = []
        begun, iterator = [], without_traceback(loader)
        for batch in iterator:
            begun.append(batch)
            images = next((images for images, _ in batches([batch])), None)
            if images is not None:
                self.first: Tensor = images
                break
        else:
            raise DataError("loader must give at least one image, got none")
        self._begun: Iterator[Any] | None = chain(begun, iterator)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        source, self._begun = self._begun, None
        count = 0
        for batch in source if source is not None else self.loader:
            count += 1
            yield batch
        self._counts.append(count)
        if len(set(self._counts)) > 1:
            raise _only_once(
                self.loader, f" with {' and then '.join(map(str, self._counts))} batches"
            )


def _only_once(loader: Any, found: str = "") -> DataError:
    return DataError(
        f"loader must be readable more than once, got {type(loader).__name__}{found}: fit on a "
        "DataLoader or a list of batches"
    )


SLOW = 0.2  # share of the time from which on loading is what limits a run


@dataclass
class Throughput:
    """Counts images and times over any number of loaders."""

    images: int = 0  # that were scored
    seconds: float = 0.0  # that it took, in this process
    waited: float = 0.0  # seconds of these in which no image was there to be scored

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; what happens between two of them counts as scoring."""
        iterator, asked = without_traceback(batches), time.perf_counter()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                came = time.perf_counter()
                self.waited += came - asked
                self.seconds += came - asked
            yield batch
            asked = time.perf_counter()
            self.seconds += asked - came

    def __str__(self) -> str:
        per_second = self.images / max(self.seconds, 1e-9)
        share = self.waited / max(self.seconds, 1e-9)
        said = (
            f"{per_second:,.0f} images per second, {per_second / torch.get_num_threads():,.0f} per "
            f"thread; {share:.0%} of the time was spent waiting for images"
        )
        return said if share < SLOW else f"{said}: try more loader processes, --num-workers"
