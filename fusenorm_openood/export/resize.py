"""Pillow's resize of uint8 images of one size, then a crop, in float32 without a rounding error.

Pillow sums pixels times weights in units of 2^-22, along one side and then along the other, and
rounds each sum to a grey level. Weights in two parts have sums below 2^24, which float32 holds
exactly in whatever order a runtime adds them up.

Source: Pillow, `src/libImaging/Resample.c`.
"""

from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import ConfigError, ExportError

BITS, LOW_BITS = 22, 8  # of weights, and of the lower part of them
EXACT = 2**24  # whole numbers up to it are float32


class _Axis(NamedTuple):
    high: Tensor  # weights `[before, after]` in units of 2^-14
    low: Tensor  # the rest of them in units of 2^-22

    def __call__(self, pixels: Tensor) -> Tensor:
        """Grey levels `[..., after]` of pixels `[..., before]`."""
        rest = torch.floor(pixels @ self.low / 2**LOW_BITS)
        one = 2 ** (BITS - LOW_BITS)
        return torch.floor((pixels @ self.high + rest + one / 2) / one).clamp(0, 255)


class Resize(NamedTuple):
    """Resizes and crops images `[N, C, H, W]` of one size."""

    width: _Axis
    height: _Axis
    is_height_first: bool

    def __call__(self, images: Tensor) -> Tensor:
        """Grey levels as float32 `[N, C, h, w]`."""
        pixels = images.float()
        if self.is_height_first:
            return self.width(self.height(pixels.mT).mT)
        return self.height(self.width(pixels).mT).mT

    @classmethod
    def of(cls, preprocessing: Preprocessing, height: int, width: int) -> "Resize":
        """That of a preprocessing; ConfigError if a program cannot do it."""
        from torchvision.transforms import InterpolationMode  # takes a second to import
        from torchvision.transforms import functional as TF

        if preprocessing.dtype != "uint8":
            raise ConfigError(
                f"a program resizes uint8 images only, got {preprocessing.dtype}: leave out "
                "resize_from, and give it images that are resized and cropped"
            )
        mode = InterpolationMode(preprocessing.interpolation)
        goal = preprocessing.resized(height, width)
        if 0 in goal:
            raise ConfigError(
                f"images of {height} x {width} have no pixels left when they are resized: leave "
                "out resize_from, and leave such images out"
            )
        size = TF.resize(Image.new("1", (width, height)), goal).size
        axes = []
        for before, after, crop in zip(
            (width, height), size, preprocessing.crop[::-1], strict=True
        ):
            if crop > after:
                raise ConfigError(
                    f"a program does not pad images, and the crop {preprocessing.crop} is larger "
                    f"than the resized image {size[::-1]}: leave out resize_from"
                )
            # Weights are whole numbers: what becomes of one pixel of 2^22.
            impulses = Image.fromarray(np.eye(before, dtype=np.int32) << BITS)
            weights = np.asarray(TF.resize(impulses, [before, after], mode))
            first = round((after - crop) / 2)
            axes.append(_split(weights[:, first : first + crop], (height, width)))
        # Which side Pillow begins with depends on its version and on the sizes.
        drawn = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
        expected = np.asarray(preprocessing.cropped(0, Image.fromarray(drawn)))
        for is_height_first in (False, True):
            resize = cls(axes[0], axes[1], is_height_first)
            if np.array_equal(resize(torch.from_numpy(drawn)), expected):
                return resize
        raise ExportError(
            f"Pillow {PIL.__version__} resizes images of {height} x {width} in a way that a "
            "program does not: leave out resize_from, and report this"
        )


def _split(weights: NDArray[np.int32], size: tuple[int, int]) -> _Axis:
    high = weights >> LOW_BITS
    low = weights - (high << LOW_BITS)
    if 255 * max(abs(high).sum(0).max(), low.sum(0).max()) + EXACT / 2**LOW_BITS >= EXACT:
        raise ConfigError(
            f"images of {size[0]} x {size[1]} are too large to be resized in a program: leave out "
            "resize_from, and give it images that are resized and cropped"
        )
    return _Axis(*(torch.from_numpy(part.astype(np.float32)) for part in (high, low)))
