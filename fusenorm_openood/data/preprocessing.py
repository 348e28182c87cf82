"""From an image, a file or a PIL image, to the tensor that a network takes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor, nn

from fusenorm_openood.data.images import UNREADABLE, read_image, to_rgb
from fusenorm_openood.data.transforms import to_tensor
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.numbers import numbers, whole
from fusenorm_openood.urls import Place, place

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre-crop and normalise, as `eval_transform` does for OpenOOD's benchmarks.

    Attributes:
        resize: length of the shorter side after resizing.
        crop: height and width of the centre crop.
        interpolation: how pixels are interpolated, `bilinear` or `bicubic` for example.
        mean: means of the RGB channels, of values in [0, 1].
        std: their standard deviations.

    Raises:
        ConfigError: a size, an interpolation or a standard deviation that cannot be.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            given = getattr(self, name)
            found = whole(given) if name == "resize" else numbers(given)
            if found is None or (name == "crop" and None in map(whole, given)):
                raise ConfigError(f"{name} must be finite numbers, of pixels whole, got {given!r}")
            object.__setattr__(self, name, found)
        if min(self.resize, *self.crop) < 1:
            raise ConfigError(f"sizes must be >= 1, got resize={self.resize}, crop={self.crop}")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"unknown interpolation {self.interpolation!r}: choose from "
                f"{', '.join(INTERPOLATIONS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"mean and std must be 3 numbers, each std > 0, got {self.mean} and {self.std}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor `[3, H, W]` of a PIL image, upright by its EXIF orientation.

        Raises:
            DataError: pixels with 32 bits, whose range is unknown.
        """
        return self._prepared(to_rgb(image))  # a copy

    def read(self, path: str | Place) -> Tensor:
        """The tensor `[3, H, W]` of an image file, local or at a URL.

        Raises:
            DataError: the file is missing or cannot be read as an image.
        """
        try:
            return self._prepared(read_image(place(path)))
        except DataError as error:
            raise DataError(f"image {path} cannot be read ({error})") from None
        except UNREADABLE as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
            raise DataError(f"image {path} cannot be read ({reason}): replace it") from None

    def _prepared(self, image: Image.Image) -> Tensor:
        """The tensor of an RGB image, which is turned upright itself: a copy takes time."""
        from torchvision.transforms import InterpolationMode  # takes a second to import
        from torchvision.transforms import functional as TF

        ImageOps.exif_transpose(image, in_place=True)
        mode = InterpolationMode(self.interpolation)
        resized = TF.center_crop(TF.resize(image, [self.resize], mode), list(self.crop))
        tensor: Tensor = TF.normalize(to_tensor(resized), list(self.mean), list(self.std))
        return tensor

    def to_json(self) -> dict[str, Any]:
        """The preprocessing in terms of JSON; see `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that `to_json` gave."""
        return cls(**record)

    @classmethod
    def of(cls, net: nn.Module) -> "Preprocessing | None":
        """The preprocessing that a network of timm or Hugging Face declares, None without."""
        declared: Any = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None)
        if not declared or "mean" not in declared:
            return None
        size = declared.get("input_size", (3, 224, 224))[1:]
        resize = int(min(size) / declared.get("crop_pct", 0.875))
        interpolation = declared.get("interpolation", "bilinear")
        return cls(resize, size, interpolation, declared["mean"], declared["std"])
