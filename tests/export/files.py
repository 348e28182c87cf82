"""Image files of many kinds, from scikit-learn's digits and its two photographs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

ORIENTATION = 0x0112  # tag of EXIF
Save = Callable[[Image.Image, Path, int], Path]  # of an image, under a path without suffix


def _turned(suffix: str, **how: Any) -> Save:
    def save(image: Image.Image, path: Path, number: int) -> Path:
        exif = Image.Exif()
        exif[ORIENTATION] = 1 + number % 8
        image.save(path.with_suffix(suffix), exif=exif, **how)
        return path.with_suffix(suffix)

    return save


def _deep(image: Image.Image, path: Path, number: int) -> Path:
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 256 + number % 256
    Image.fromarray(grey).save(path.with_suffix((".png", ".tif")[number % 2]))
    return path.with_suffix((".png", ".tif")[number % 2])


def _in_mode(mode: str, suffix: str) -> Save:
    def save(image: Image.Image, path: Path, number: int) -> Path:
        converted = image.convert(mode)
        if "A" in mode:
            converted.putalpha(image.convert("L"))
        converted.save(path.with_suffix(suffix))
        return path.with_suffix(suffix)

    return save


KINDS: dict[str, Save] = {
    "JPEG, turned": _turned(".jpg", quality=80),
    "WebP, turned": _turned(".webp"),
    "PNG, turned": _turned(".png"),
    "16 bit": _deep,
    "CMYK JPEG": _in_mode("CMYK", ".jpg"),
    "CMYK TIFF": _in_mode("CMYK", ".tif"),
    "TIFF": _in_mode("RGB", ".tif"),
    "grey JPEG": _in_mode("L", ".jpg"),
    "palette GIF": _in_mode("P", ".gif"),
    "palette PNG": _in_mode("P", ".png"),
    "PNG with alpha": _in_mode("RGBA", ".png"),
    "grey WebP with alpha": _in_mode("LA", ".webp"),
    "grey PNG with alpha": _in_mode("LA", ".png"),
    "black and white": _in_mode("1", ".png"),
}


def write_files(folder: Path, count: int) -> list[Path]:
    """Write files of odd sizes, digits and photographs in turn."""
    rng, digits, photographs = np.random.default_rng(0), load_digits().images, load_sample_images()
    folder.mkdir()
    kinds, paths = list(KINDS.values()), []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(9, 120, 2))
        if number % 2:
            pixels = photographs.images[number // 2 % 2]
            left, top = (int(rng.integers(0, side - 120)) for side in pixels.shape[1::-1])
            image = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        else:
            pixels = (digits[number] * 15.9).astype(np.uint8)
            image = Image.fromarray(pixels).resize((width, height)).convert("RGB")
        paths.append(kinds[number % len(kinds)](image, folder / f"{number:04}", number))
    return paths


def noise_images(count: int, height: int, width: int) -> np.ndarray:
    """Noise, and squares of black and white, whose sums lie between grey levels."""
    drawn = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    drawn[0] = 255 * (np.indices((height, width)).sum(0) % 2)[..., None]
    return drawn
