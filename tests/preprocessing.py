"""OpenOOD's preprocessing, written with PIL and numpy."""

from typing import NamedTuple

import numpy as np
from PIL import Image


class Preprocessing(NamedTuple):
    """Sides in pixels before and after cropping; mean and standard deviation of RGB in [0, 1]."""

    pre_size: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """`[H, W, 3]` of 0 to 255 -> `[3, H, W]`."""
        return ((pixels / 255 - self.mean) / self.std).transpose(2, 0, 1)

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """The inverse of `normalised`; all values must be whole numbers of 0 to 255."""
        pixels = (np.asarray(images, np.float64).transpose(1, 2, 0) * self.std + self.mean) * 255
        np.testing.assert_allclose(pixels, pixels.round(), atol=0.01)
        return pixels.round().astype(np.uint8)

    def resized(self, image: Image.Image) -> np.ndarray:
        """The shorter side resized to `pre_size`, the centre cropped: `[size, size, 3]`."""
        scale = self.pre_size / min(image.size)
        width, height = (int(side * scale) for side in image.size)
        large = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return large[top : top + self.size, left : left + self.size]


IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PREPROCESSING = {
    "cifar10": Preprocessing(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Preprocessing(32, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet200": IMAGENET,
    "imagenet": IMAGENET,
    "digits": Preprocessing(24, 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def drawn_image() -> Image.Image:
    """An image of 40 rows and 60 columns, no two pixels alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
