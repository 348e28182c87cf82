"""OpenOOD's preprocessing of training and test images.

torchvision, which takes a second to import, is imported for the first image only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusenorm_openood.errors import ConfigError

Transform = Callable[[Image.Image], Tensor]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation of the RGB channels, under OpenOOD's names.
NORMALIZATIONS: dict[str, Normalization] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def find_normalization(name: str) -> Normalization:
    """Mean and standard deviation for a `normalization_type`; ConfigError if it is unknown."""
    if name not in NORMALIZATIONS:
        raise ConfigError(
            f"unknown normalization_type {name!r}: choose from {', '.join(NORMALIZATIONS)}"
        )
    return NORMALIZATIONS[name]


def parse_normalization(text: str) -> Normalization:
    """Mean and standard deviation from a name in `NORMALIZATIONS` or from `M,M,M,S,S,S`.

    >>> parse_normalization("0.5,0.5,0.5,0.25,0.25,0.25")
    ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    Raises:
        ConfigError: neither of the two, or a standard deviation that is not positive.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != 6 or not all(map(isfinite, numbers)) or min(numbers[3:]) <= 0:
        raise ConfigError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)}, or six numbers "
            f"M,M,M,S,S,S with each S > 0, got {text!r}"
        )
    return numbers[:3], numbers[3:]


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side (bilinear), centre-crop and normalise to `[3, size, size]`.

    Attributes:
        norm: mean and standard deviation of the RGB channels.
        sizes: length of the shorter side after resizing, and of the sides of the centre crop;
            None = neither resized nor cropped.
    """

    norm: Normalization
    sizes: tuple[int, int] | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        return self._steps(image)

    @cached_property
    def _steps(self) -> Transform:
        return _compose(*(_resized(*self.sizes) if self.sizes else ()), *_normalised(self.norm))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as `[3, H, W]` in [0, 1]: torchvision's, in float32 whatever torch's default."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255)


def eval_transform(pre_size: int, image_size: int, norm: Normalization) -> Transform:
    """OpenOOD's transform of test images; see `EvalTransform`."""
    return EvalTransform(norm, (pre_size, image_size))


def plain_transform(norm: Normalization) -> Transform:
    """Normalise only, for images that already have their final size, such as ImageNet-C's."""
    return EvalTransform(norm)


def train_transform(
    pre_size: int, image_size: int, norm: Normalization, flip: bool = True, zoom: bool = False
) -> Transform:
    """OpenOOD's standard augmentation of training images.

    A random crop with a padding of one eighth (4 of 32 pixels), or with `zoom`, as for ImageNet, a
    crop of random scale and aspect ratio; with `flip`, also a random horizontal flip.
    """
    from torchvision import transforms

    mirror = [transforms.RandomHorizontalFlip()] if flip else []
    if zoom:
        bilinear = transforms.InterpolationMode.BILINEAR
        crop = transforms.RandomResizedCrop(image_size, interpolation=bilinear)
        return _compose(crop, *mirror, *_normalised(norm))
    crop = transforms.RandomCrop(image_size, padding=image_size // 8)
    return _compose(*_resized(pre_size, image_size), *mirror, crop, *_normalised(norm))


def _resized(pre_size: int, image_size: int) -> list[Any]:
    from torchvision import transforms

    resize = transforms.Resize(pre_size, transforms.InterpolationMode.BILINEAR)
    return [resize, transforms.CenterCrop(image_size)]


def _normalised(norm: Normalization) -> list[Any]:
    from torchvision import transforms

    return [to_tensor, transforms.Normalize(*norm)]


def _compose(*steps: Any) -> Transform:
    from torchvision import transforms

    transform: Transform = transforms.Compose(steps)
    return transform
