"""From image files to the tensors that a network was trained on.

torchvision, which takes a second to import, is imported for the first image only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import floor, isfinite
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fusenorm_openood.data.images import UNREADABLE, read_image, read_picture
from fusenorm_openood.errors import ConfigError, DataError, RemoteError, number, numbers, whole
from fusenorm_openood.storage.configs import typed
from fusenorm_openood.storage.urls import Place, place

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
        from torchvision.transforms import functional as TF

        if self.sizes:
            bilinear = TF.InterpolationMode.BILINEAR
            image = TF.center_crop(TF.resize(image, self.sizes[0], bilinear), self.sizes[1])
        tensor: Tensor = TF.normalize(to_tensor(image), *self.norm)
        return tensor


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as `[3, H, W]` in [0, 1]: torchvision's, in float32 whatever torch's default."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255)


def eval_transform(pre_size: int, image_size: int, norm: Normalization) -> Transform:
    """OpenOOD's transform of test images; see `EvalTransform`."""
    return EvalTransform(norm, (pre_size, image_size))


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
    transform: Transform = T.Compose([*steps, to_tensor, T.Normalize(*norm)])
    return transform


CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre-crop and normalise, as `eval_transform` does for OpenOOD's benchmarks.

    >>> preprocessing = Preprocessing(36, (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3)
    >>> preprocessing(Image.new("RGB", (64, 48))).shape
    torch.Size([3, 32, 32])

    Attributes:
        resize: size before cropping: height and width, or one length for both.
        crop: height and width of the centre crop.
        interpolation: how pixels are interpolated, `bilinear` or `bicubic` for example.
        mean: means of the RGB channels, of values in [0, 1].
        std: their standard deviations.
        crop_mode: as in timm. `center`: the image keeps its aspect ratio and covers `resize`, so
            that one length is that of its shorter side; `squash`: it gets that very size; `border`:
            it keeps its aspect ratio, fits into that size and is padded with `mean`.
        bits: bits per pixel of 16-bit images that do not say it themselves; see `read_image`.

    Raises:
        ConfigError: a size, a name, a standard deviation or a number of bits that cannot be.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            given = getattr(self, name)
            one = number(given) if name == "resize" else None
            found = numbers(given) if one is None else (one,)
            in_pixels = name in ("resize", "crop")
            if found is None or (in_pixels and None in map(whole, found)):
                raise ConfigError(f"{name} must be finite numbers, of pixels whole, got {given!r}")
            object.__setattr__(self, name, found if one is None else one)
        sides = (*as_pair(self.resize), *self.crop)
        if len(sides) != 4 or len(self.crop) != 2 or min(sides) < 1:
            raise ConfigError(
                f"sizes must be >= 1, of a crop two, got resize={self.resize}, crop={self.crop}"
            )
        for name, choice in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            if (given := getattr(self, name)) not in choice:
                raise ConfigError(f"unknown {name} {given!r}: choose from {', '.join(choice)}")
        if self.bits is not None:
            bits = whole(self.bits)
            if bits is None or not 8 <= bits <= 16:
                raise ConfigError(f"bits must be from 8 to 16, got {self.bits!r}")
            object.__setattr__(self, "bits", bits)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"mean and std must be 3 numbers, each std > 0, got {self.mean} and {self.std}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor `[3, H, W]` of a PIL image, upright by its EXIF orientation.

        Raises:
            DataError: it cannot be decoded, or the range of its pixels is unknown.
        """
        with _reading("the image"):
            return self._prepared(read_picture(image, self.bits))  # a copy

    def read(self, path: str | Place) -> Tensor:
        """The tensor `[3, H, W]` of an image file, local or at a URL.

        Raises:
            DataError: the file is missing or cannot be read as an image.
        """
        with _reading(f"image {path}"):
            return self._prepared(read_image(place(path), self.bits))

    def _prepared(self, image: Image.Image) -> Tensor:
        """The tensor of an RGB image, which is turned upright itself: a copy takes time."""
        from torchvision.transforms import InterpolationMode  # takes a second to import
        from torchvision.transforms import functional as TF

        ImageOps.exif_transpose(image, in_place=True)
        mode = InterpolationMode(self.interpolation)
        resized = TF.resize(image, self._resized(image.height, image.width), mode)
        if self.crop_mode == "border":
            short = [max(c - s, 0) for c, s in zip(self.crop[::-1], resized.size, strict=True)]
            sides = [*(side // 2 for side in short), *((side + 1) // 2 for side in short)]
            resized = TF.pad(resized, sides, [round(255 * value) for value in self.mean])
        cropped = TF.center_crop(resized, list(self.crop))
        tensor: Tensor = TF.normalize(to_tensor(cropped), list(self.mean), list(self.std))
        return tensor

    def _resized(self, height: int, width: int) -> list[int]:
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
        """The preprocessing in terms of JSON, without what is as by default; see `from_json`."""
        unchanged = {"crop_mode": "center", "bits": None}
        return {k: v for k, v in asdict(self).items() if k not in unchanged or v != unchanged[k]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that `to_json` gave; ConfigError if it is something else."""
        preprocessing: Preprocessing = typed(cls, record, "preprocessing")
        return preprocessing

    @classmethod
    def of(cls, net: nn.Module, size: int | None = None) -> "Preprocessing | None":
        """The preprocessing that a network of timm or Hugging Face declares, None without.

        Args:
            net: the network.
            size: of both sides of the crop, as in timm with the declared share of the image; None =
                as declared.
        """
        declared: Any = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None)
        if not declared or not declared.get("mean"):
            return None
        crop = (size, size) if size else (declared.get("input_size") or (3, 224, 224))[1:]
        share, mode = declared.get("crop_pct") or 0.875, declared.get("crop_mode") or "center"
        sides = [floor(side / share) for side in crop]
        resize = sides[0] if sides[0] == sides[1] else (sides[0], sides[1])
        interpolation = declared.get("interpolation") or "bicubic"
        return cls(resize, crop, interpolation, declared["mean"], declared["std"], mode)


def as_pair(resize: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size, where one length stands for both."""
    return (resize, resize) if isinstance(resize, int) else resize


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Context in which an image that cannot be decoded is a DataError."""
    try:
        yield
    except RemoteError:
        raise
    except DataError as error:
        raise DataError(f"{what} cannot be read ({error})") from None
    except UNREADABLE as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{what} cannot be read ({reason}): replace it") from None
