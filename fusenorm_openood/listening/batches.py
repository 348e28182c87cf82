"""Batches of images from any kind of loader."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fusenorm_openood.errors import DataError, NonFiniteError

Labels = NDArray[np.int64]
# Keys of a batch that is a dict: OpenOOD's and DALI's, Hugging Face's, and other usual ones.
IMAGES = ("data", "pixel_values", "image", "images", "img")
LABELS = ("label", "labels", "target", "targets")


def not_finite(images: Tensor | None, image: int, what: str) -> NonFiniteError:
    """The error for one image of a batch, which says whether image or network is at fault.

    Recorded images are None: they came from files, and so were finite.
    """
    way_out = (
        "the image is finite, so the network overflows: check its weights"
        if images is None or torch.isfinite(images[image]).all()
        else "the image itself contains NaN or infinity: repair it or leave it out"
    )
    return NonFiniteError(f"image {image} of the batch has {what}; {way_out}")


def checked_images(images: Any) -> Tensor:
    """The given images, if they are a floating-point tensor `[B, C, H, W]`; else DataError."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        is_array = isinstance(images, Tensor | np.ndarray)
        found = f"{images.dtype} {list(images.shape)}" if is_array else type(images).__name__
        raise DataError(
            f"images must be a floating-point tensor [B, C, H, W], got {found}: loaders may give "
            "(images, labels), {'data': images, 'label': labels} or images alone"
        )
    return images


def batches(
    loader: Iterable[Any], progress: bool = False, desc: str = ""
) -> Iterator[tuple[Tensor, Labels | None]]:
    """Images `[B, C, H, W]` and class labels `[B]` of each batch, for any kind of loader.

    A batch is `(images, labels)`, images alone, or a dict (also as the only item of a list) with
    one of `IMAGES` and one of `LABELS` among its keys. Images are tensors or NumPy arrays. Labels
    are copied, for a view of what a worker process shares would hold a file open; they are None if
    the loader gives none, or something else than one integer per image.

    Raises:
        DataError: an unknown kind of batch, or one with different numbers of images and labels.
    """
    for batch in without_traceback(tqdm(loader, desc=desc, disable=not progress, leave=False)):
        given, labels = _parts(batch)
        if isinstance(given, np.ndarray) and given.dtype.kind == "f":
            given = torch.from_numpy(given.astype(np.float32))
        images = checked_images(given)
        classes = _class_labels(labels, len(images))
        if len(images):
            yield images, classes


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


def without_traceback(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader that raises a DataError from a worker process without the worker's traceback."""
    try:
        yield from loader
    except DataError as error:
        sentence = str(error).rstrip().splitlines()[-1]
        prefix = f"{DataError.__module__}.{DataError.__name__}: "
        raise DataError(sentence.removeprefix(prefix)) from None
