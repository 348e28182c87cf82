"""Images as users give them, and what is wrong with them where a score is not finite."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.forward.experts import BatchScores, Expert
from fusenorm_openood.method.scores.base import Score

# Tensors as the network takes them; or, where preprocessing is known, pictures, their files, uint8
# pixels (tensors [C, H, W], arrays [H, W, C], or batches of them), and lists of these.
Images = Tensor | NDArray[np.uint8] | Image.Image | str | Path | Sequence[Any]


class Given(NamedTuple):
    """Images `[B, C, H, W]`, perhaps only one that was given as `[C, H, W]`."""

    batch: Tensor
    is_one: bool

    @classmethod
    def of(cls, images: Images, preprocessing: Callable[[], Preprocessing]) -> "Given":
        """Read images; DataError for anything else, or if `preprocessing` cannot read them."""
        tensor = _tensor(images, preprocessing)
        is_one = tensor.ndim == 3
        return cls(tensor.unsqueeze(0) if is_one else tensor, is_one)

    def results(self, values: NDArray[Any]) -> Tensor:
        """Results `[B]` on the device of the images; of one image without a dimension."""
        found, device = torch.from_numpy(values), self.batch.device
        found = found.float() if device.type == "mps" and found.is_floating_point() else found
        return found.to(device)[0 if self.is_one else ...]


def _tensor(images: Images, preprocessing: Callable[[], Preprocessing]) -> Tensor:
    if isinstance(images, list | tuple):
        tensors = [_tensor(image, preprocessing) for image in images]
        if len({tensor.shape for tensor in tensors}) != 1:
            shapes = [list(tensor.shape) for tensor in tensors[:3]] or "no image"
            raise DataError(f"a list must have images, all of one size, got {shapes}")
        return torch.stack(tensors)
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim > 2:
        images = images.movedim(-3, -1).cpu().numpy()
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        if images.ndim == 4:
            return _tensor(list(images), preprocessing)
        grey = images[..., 0] if images.ndim == 3 and images.shape[-1] == 1 else images
        if grey.ndim != 2 and grey.shape[2:] != (3,):
            raise DataError(
                "uint8 images must be arrays [H, W, 3] or [H, W], or tensors [3, H, W], got "
                f"pixels [H, W, C] of shape {list(images.shape)}: give files, or tensors as "
                "the network takes them"
            )
        images = Image.fromarray(grey)
    if isinstance(images, str | Path):
        return preprocessing().read(images)
    if isinstance(images, Image.Image):
        return preprocessing()(images)
    return images if isinstance(images, Tensor) else checked_images(images)


def checked_images(images: Any) -> Tensor:
    """The given images, if they are a floating-point tensor `[B, C, H, W]`; else DataError."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        is_array = isinstance(images, Tensor | np.ndarray)
        found = f"{images.dtype} {list(images.shape)}" if is_array else type(images).__name__
        raise DataError(
            f"images must be a floating-point tensor [B, C, H, W], got {found}: give tensors "
            "as the network takes them, of a file preprocessing.read(file); score and is_ood also "
            "take files, PIL images and uint8 pixels if the detector has its preprocessing, and "
            "loaders may give (images, labels), {'data': images, 'label': labels} or images alone"
        )
    return images


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


def check_features(batch: BatchScores) -> None:
    """Raise NonFiniteError if a feature of a batch is not finite."""
    finite = batch.features.feature.isfinite().all(dim=1)
    if not finite.all():
        image = int((~finite).nonzero()[0, 0])
        raise not_finite(batch.images, image, "a penultimate feature that is not finite")
