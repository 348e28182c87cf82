"""Batches of images, whatever kind of loader gives them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusenorm_openood.errors import DataError, NonFiniteError


def not_finite(images: Tensor, image: int, what: str) -> NonFiniteError:
    """The error for one image of a batch, which says whether image or network is to blame."""
    way_out = (
        "the image is finite, so the network overflows: look at its weights"
        if torch.isfinite(images[image]).all()
        else "the image itself holds NaN or infinity: repair or leave out that image"
    )
    return NonFiniteError(f"image {image} of the batch has {what}; {way_out}")


def checked_images(images: Any) -> Tensor:
    """Images ``[B, C, H, W]`` in floating point as they are; DataError for anything else."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        is_tensor = isinstance(images, Tensor)
        found = f"{images.dtype} {list(images.shape)}" if is_tensor else type(images).__name__
        raise DataError(
            f"{found} found in the place of images [B, C, H, W] in floating point: give them so, "
            "and loaders of (images, labels), {'data': images, 'label': labels} or images alone"
        )
    return images


def batches(
    loader: Iterable[Any], progress: bool = False, desc: str = ""
) -> Iterator[tuple[Tensor, Any]]:
    """Images and labels (or None) of each batch, whatever kind of batch the loader gives.

    Raises:
        DataError: a batch of another kind, or with another number of labels than of images.
    """
    for batch in _told_plainly(tqdm(loader, desc=desc, disable=not progress, leave=False)):
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


def _told_plainly(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader whose worker processes wrap no traceback around an error of ours."""
    try:
        yield from loader
    except DataError as error:
        sentence = str(error).rstrip().splitlines()[-1]
        prefix = f"{DataError.__module__}.{DataError.__name__}: "
        raise DataError(sentence.removeprefix(prefix)) from None
