"""From image files to the tensors that a network was trained on.

torchvision, which takes a second to import, is imported for the first image only.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from math import floor, inf, isfinite, prod
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fusenorm_openood.data.images import reading
from fusenorm_openood.data.pixels import read_bands
from fusenorm_openood.errors import ConfigError, DataError, numbers, whole
from fusenorm_openood.method.validation import Rule, among, check_fields, checked
from fusenorm_openood.storage import configs, urls

Transform = Callable[[Image.Image], Tensor]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation of the RGB channels, under OpenOOD's names.
NORMALIZATIONS: dict[str, Normalization] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def parse_normalization(text: str, channels: int | None = 3) -> Normalization:
    """Mean and standard deviation from a name in `NORMALIZATIONS` or from `M,M,M,S,S,S`.

    >>> parse_normalization("0.5,0.5,0.5,0.25,0.25,0.25")
    ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    `channels` is how many there must be of each, None = any number.

    Raises:
        ConfigError: neither of the two, or a standard deviation that is not positive.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    half = channels or max(len(numbers) // 2, 1)
    if len(numbers) != 2 * half or not all(map(isfinite, numbers)) or min(numbers[half:]) <= 0:
        given = "six numbers M,M,M,S,S,S" if channels else "M,...,S,... for each channel"
        raise ConfigError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)}, or {given} with each "
            f"S > 0, got {text!r}"
        )
    return numbers[:half], numbers[half:]


@dataclass(frozen=True)
class EvalTransform:
    """OpenOOD's transform of test images: resized, cropped, normalised to `[3, size, size]`."""

    norm: Normalization
    # Length of the shorter side after bilinear resizing, and of the sides of the centre crop; None
    # = neither resized nor cropped.
    sizes: tuple[int, int] | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        from torchvision.transforms import functional as TF

        if self.sizes:
            bilinear = TF.InterpolationMode.BILINEAR
            image = TF.center_crop(TF.resize(image, self.sizes[0], bilinear), self.sizes[1])
        found: Tensor = TF.normalize(to_tensor(image), *self.norm)
        return found


def to_unit(pixels: Tensor, span: tuple[float, float]) -> Tensor:
    """Pixels within a span as float32 in [0, 1]."""
    low, high = span
    pixels = pixels.float()
    return (pixels - low if low else pixels) / (high - low)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as `[3, H, W]` in [0, 1]: torchvision's, in float32 whatever torch's default."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return to_unit(pixels, (0, 255))


def train_transform(
    pre_size: int, image_size: int, norm: Normalization, flip: bool = True, zoom: bool = False
) -> Transform:
    """OpenOOD's standard augmentation of training images.

    A random crop with a padding of one eighth (4 of 32 pixels), or with `zoom`, as for ImageNet, a
    crop of random scale and aspect ratio; with `flip`, also a random horizontal flip.
    """
    from torchvision import transforms as T

    bilinear = T.InterpolationMode.BILINEAR
    mirror = [T.RandomHorizontalFlip()] if flip else []
    if zoom:
        steps = [T.RandomResizedCrop(image_size, interpolation=bilinear), *mirror]
    else:
        sizes = [T.Resize(pre_size, bilinear), T.CenterCrop(image_size)]
        steps = [*sizes, *mirror, T.RandomCrop(image_size, padding=image_size // 8)]
    found: Transform = T.Compose([*steps, to_tensor, T.Normalize(*norm)])
    return found


def _pixels(value: Any) -> tuple[int, ...] | None:
    found = numbers(value) or ()
    return tuple(n for n in found if isinstance(n, int)) if None not in map(whole, found) else None


INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
_SIDES = Rule("two whole numbers >= 1", _pixels, lambda v: len(v) == 2 and min(v) >= 1)
_SIZE = Rule(
    "one or two whole numbers >= 1",
    lambda v: _pixels(v) if whole(v) is None else whole(v),
    lambda v: len(as_pair(v)) == 2 and min(as_pair(v)) >= 1,
)
_MEAN = Rule("a number for each channel", numbers, lambda v: len(v) > 0)
_STD = Rule("numbers > 0", numbers, lambda v: len(v) > 0 and min(v) > 0)
_BITS = Rule("a whole number from 8 to 16", whole, lambda v: 8 <= v <= 16)
_RANGE = Rule("two numbers LOW < HIGH", numbers, lambda v: len(v) == 2 and v[0] < v[1])
_SHOWN = Rule("one or three channels >= 0", _pixels, lambda v: len(v) in (1, 3) and min(v) >= 0)
DTYPES = ("uint8", "uint16", "float32")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre-crop and normalise, as `EvalTransform` does for OpenOOD's benchmarks.

    >>> preprocessing = Preprocessing(36, (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3)
    >>> preprocessing(Image.new("RGB", (64, 48))).shape
    torch.Size([3, 32, 32])

    Attributes:
        resize: size before cropping: height and width, or one length for both.
        crop: height and width of the centre crop.
        interpolation: how pixels are interpolated, `bilinear` or `bicubic` for example.
        mean: means of the channels, RGB if there are three, of values in [0, 1]; their number is
            that of the channels.
        std: their standard deviations.
        crop_mode: as in timm. `center`: the image keeps its aspect ratio and covers `resize`, so
            that one length is that of its shorter side; `squash`: it gets that very size; `border`:
            it keeps its aspect ratio, fits into that size and is padded with `mean`.
        bits: bits per pixel of 16-bit images that do not say it themselves; see `read_image`.
        dtype: what pixels are kept as. `uint8`: 0 to 255, to which 16-bit images are scaled;
            `uint16`: 0 to 2^bits - 1, of images of just that many bits, 16 if it is None;
            `float32`: of any numbers in `range`.
        range: the numbers that are 0 and 1 to `mean` and `std`, of `float32` only.
        shown: which channels, counted from 0, pictures in reports show as red, green and blue, or
            in grey; None = the three of RGB, else the mean of all in grey.

    Raises:
        ConfigError: a field that cannot be, or does not go with the others.
    """

    resize: int | tuple[int, int] = checked(MISSING, _SIZE)
    crop: tuple[int, int] = checked(MISSING, _SIDES)
    interpolation: str = checked(MISSING, among(*INTERPOLATIONS))
    mean: tuple[float, ...] = checked(MISSING, _MEAN)
    std: tuple[float, ...] = checked(MISSING, _STD)
    crop_mode: str = checked("center", among("center", "squash", "border"))
    bits: int | None = checked(None, _BITS.or_none())
    dtype: str = checked("uint8", among(*DTYPES))
    range: tuple[float, float] | None = checked(None, _RANGE.or_none())
    shown: tuple[int, ...] | None = checked(None, _SHOWN.or_none())

    def __post_init__(self) -> None:
        check_fields(self)
        count, is_float = self.channels, self.dtype == "float32"
        Rule(f"{count} numbers > 0, as many as means", numbers, lambda v: len(v) == count)(
            "std", self.std
        )
        if not is_float and not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise ConfigError(
                f"mean must be of pixels in [0, 1], got {self.mean}: divide mean and std by "
                f"{self.span[1]} if they are of whole numbers"
            )
        if is_float == (self.range is None) or (is_float and self.bits is not None):
            raise ConfigError(
                "range must be two numbers LOW < HIGH with dtype float32, which has no bits, and "
                f"None with others, got {self.range} with {self.dtype} and bits {self.bits}"
            )
        Rule(f"channels < {count}", _pixels, lambda v: max(v) < count).or_none()(
            "shown", self.shown
        )

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return len(self.mean)

    @property
    def span(self) -> tuple[float, float]:
        """The values of pixels that are 0 and 1 to `mean` and `std`."""
        deepest = (self.bits or 16) if self.dtype == "uint16" else 8
        return self.range or (0, 2**deepest - 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor `[C, H, W]` of a PIL image, upright by its EXIF orientation.

        DataError if it cannot be decoded, or is not of this preprocessing's channels and range.
        """
        return self._normalised(self._pixels(image, "the image"))

    def read(self, path: str | urls.Place) -> Tensor:
        """The tensor `[C, H, W]` of an image file or URL; DataError as for a PIL image."""
        return self._normalised(self.pixels(path))

    def pixels(self, path: str | urls.Place) -> Tensor:
        """The image of a file or URL as an exported program takes it: `[C, H, W]` within `span`.

        In uint8, or in float32 for the other types. DataError as for a PIL image.
        """
        return self._pixels(urls.place(path), f"image {path}")

    def _pixels(self, given: urls.Place | Image.Image, name: str) -> Tensor:
        with reading(name):
            bands = read_bands(given, self)  # copies, which are turned upright themselves
            for band in bands:
                if 0 in band.size:
                    width, height = band.size
                    raise DataError(f"it has no pixels, at {width} x {height}: leave it out")
            arrays = [np.array(self.cropped(n, band)) for n, band in enumerate(bands)]
        parts = [torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1) for array in arrays]
        pixels = torch.cat(parts)
        return pixels.round().clamp(*self.span) if self.dtype == "uint16" else pixels

    def cropped(self, number: int, band: Image.Image) -> Image.Image:
        """RGB, or one channel, as it is resized, padded and cropped."""
        from torchvision.transforms import InterpolationMode  # takes a second to import
        from torchvision.transforms import functional as TF

        ImageOps.exif_transpose(band, in_place=True)
        mode, target = InterpolationMode(self.interpolation), self.resized(band.height, band.width)
        check_resized(band, target)
        resized = TF.resize(band, target, mode)
        short = [max(c - s, 0) for c, s in zip(self.crop[::-1], resized.size, strict=True)]
        if any(short):
            (low, high), is_border = self.span, self.crop_mode == "border"
            means = self.mean if band.mode == "RGB" else self.mean[number : number + 1]
            fill = [low + value * is_border * (high - low) for value in means]
            fill = fill if self.dtype == "float32" else [*map(round, fill)]
            sides = [*(side // 2 for side in short), *((side + 1) // 2 for side in short)]
            resized = TF.pad(resized, sides, fill if band.mode == "RGB" else fill[0])
        found: Image.Image = TF.center_crop(resized, list(self.crop))
        return found

    def _normalised(self, pixels: Tensor) -> Tensor:
        from torchvision.transforms import functional as TF

        unit = to_unit(pixels, self.span)
        found: Tensor = TF.normalize(unit, list(self.mean), list(self.std))
        return found

    def resized(self, height: int, width: int) -> list[int]:
        """What torchvision's `resize` takes: one length is that of the shorter side."""
        target = as_pair(self.resize)
        if self.crop_mode == "squash":
            return list(target)
        if self.crop_mode == "center" and target[0] == target[1]:
            return [target[0]]
        ratios = height / target[0], width / target[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return [round(height / ratio), round(width / ratio)]

    def to_json(self) -> dict[str, Any]:
        """The preprocessing in terms of JSON, without what is as by default."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that `to_json` gave; ConfigError if it is something else."""
        found: Preprocessing = configs.typed(cls, record, "preprocessing")
        return found

    @classmethod
    def of(cls, net: nn.Module, size: int | None = None) -> "Preprocessing | None":
        """The preprocessing that a network of timm or Hugging Face declares, None without.

        `size` is that of both sides of the crop, in the declared proportion to the resized image.
        """
        declared: Any = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None)
        if not declared or not declared.get("mean"):
            return None
        crop = (size, size) if size else (declared.get("input_size") or (3, 224, 224))[1:]
        part, mode = declared.get("crop_pct") or 0.875, declared.get("crop_mode") or "center"
        sides = [floor(side / part) for side in crop]
        resize = sides[0] if sides[0] == sides[1] else (sides[0], sides[1])
        interpolation = declared.get("interpolation") or "bicubic"
        return cls(resize, crop, interpolation, declared["mean"], declared["std"], mode)


def as_pair(resize: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size, where one length stands for both."""
    return (resize, resize) if isinstance(resize, int) else resize


def check_resized(image: Image.Image, target: list[int]) -> None:
    """Refuse a thin image whose shorter side is made longer, before memory is taken for it."""
    short, long = sorted(image.size)
    count = prod(target) if len(target) == 2 else target[0] ** 2 * long // short
    limit = 2 * (Image.MAX_IMAGE_PIXELS or inf)
    if count > limit:
        raise DataError(
            f"it is {image.width} x {image.height}, and would have {count} pixels when resized, "
            f"more than the {limit} that PIL reads: crop it"
        )
