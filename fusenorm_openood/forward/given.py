"""Images as users give them: tensors, pictures, files, arrays, and lists of these."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.batches import checked_images

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
