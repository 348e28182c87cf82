"""Batches of images from any kind of loader."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusenorm_openood.errors import DataError, NonFiniteError


def not_finite(images: Tensor, image: int, what: str) -> NonFiniteError:
    """The error for one image of a batch, which says whether image or network is at fault."""
    way_out = (
        "the image is finite, so the network overflows: check its weights"
        if torch.isfinite(images[image]).all()
        else "the image itself contains NaN or infinity: repair it or leave it out"
    )
    return NonFiniteError(f"image {image} of the batch has {what}; {way_out}")


def checked_images(images: Any) -> Tensor:
    """The given images, if they are a floating-point tensor `[B, C, H, W]`; else DataError."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        is_tensor = isinstance(images, Tensor)
        found = f"{images.dtype} {list(images.shape)}" if is_tensor else type(images).__name__
        raise DataError(
            f"images must be a floating-point tensor [B, C, H, W], got {found}: loaders may give "
            "(images, labels), {'data': images, 'label': labels} or images alone"
        )
    return images


def batches(
    loader: Iterable[Any], progress: bool = False, desc: str = ""
) -> Iterator[tuple[Tensor, Any]]:
    """Images and labels (or None) of each batch, for any kind of loader.

    Raises:
        DataError: an unknown kind of batch, or one with different numbers of images and labels.
    """
    for batch in without_traceback(tqdm(loader, desc=desc, disable=not progress, leave=False)):
        if isinstance(batch, dict):
            images, labels = batch.get("data"), batch.get("label")
        elif isinstance(batch, tuple | list) and len(batch) >= 1:
            images, labels = batch[0], batch[1] if len(batch) > 1 else None
        else:
            images, labels = batch, None
        images = checked_images(images)
        if isinstance(labels, Tensor | np.ndarray | list | tuple):
            _check_labels(labels, images)
        if len(images):
            yield images, labels


def _check_labels(labels: Any, images: Tensor) -> None:
    count = len(labels) if getattr(labels, "ndim", 1) else 0
    if count != len(images):
        raise DataError(
            f"a batch of {len(images)} images has {count} labels: give one label per image, or none"
        )


def without_traceback(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader that raises a DataError from a worker process without the worker's traceback."""
    try:
        yield from loader
    except DataError as error:
        sentence = str(error).rstrip().splitlines()[-1]
        prefix = f"{DataError.__module__}.{DataError.__name__}: "
        raise DataError(sentence.removeprefix(prefix)) from None
