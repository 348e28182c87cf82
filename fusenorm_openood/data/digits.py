"""The embedded benchmark: images that ship with scikit-learn, written in OpenOOD's layout.

The ID classes are the handwritten digits 0 to 6. Digit 7 is the OOD validation set; 8 and 9 are
near-OOD. Far-OOD are patches of scikit-learn's two photographs, uniform noise, and stripes. All
images are greyscale with 24x24 pixels; the digits are upscaled from 8x8.
"""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import DataError, os_errors

Grey = NDArray[np.uint8]  # [N, 24, 24]
Labelled = tuple[Grey, NDArray[np.int64]]

ID_CLASSES = 7
FAR_IMAGES = 400
SIZE = 24


def digits_image_sets(seed: int = 0) -> dict[str, Labelled]:
    """Images and labels of every list of the benchmark, determined by the seed."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    images, labels = _enlarged(digits.images), digits.target.astype(np.int64)

    sets: dict[str, Labelled] = {}
    order = rng.permutation(np.flatnonzero(labels < ID_CLASSES))
    parts = np.split(order, [int(0.7 * len(order)), int(0.8 * len(order))])
    for split, chosen in zip(("train", "val", "test"), parts, strict=True):
        sets[f"{split}_digits"] = images[chosen], labels[chosen]
    for name, digit in (("val_digit7", 7), ("test_digit8", 8), ("test_digit9", 9)):
        sets[name] = _ood(images[labels == digit])
    china, flower = load_sample_images().images
    sets["test_china"] = _ood(_patches(china, rng))
    sets["test_flower"] = _ood(_patches(flower, rng))
    noise = rng.integers(0, 256, (FAR_IMAGES, SIZE, SIZE), dtype=np.uint8)
    sets["test_noise"] = _ood(noise)
    sets["test_stripes"] = _ood(_stripes(rng))
    return sets


def write_digits(data_root: str | Path, seed: int = 0) -> None:
    """Write the benchmark's images and lists under a data root, unless they all exist.

    DataError if the data root is not writable.
    """
    benchmark = load_benchmark("digits", data_root)
    if not benchmark.missing(benchmark.every()):
        return
    root = Path(data_root)
    homes = {"images": root / "images_digits", "lists": root / "benchmark_imglist" / "digits"}
    what = f"the digits benchmark cannot be written under {root}"
    with os_errors(DataError, what, "choose a writable folder with --data-root"):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".digits-") as unfinished:
            for name, (grey, labels) in digits_image_sets(seed).items():
                _write(Path(unfinished), name, grey, labels)
            for made, folder in homes.items():
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                (Path(unfinished) / made).rename(folder)


def _write(root: Path, name: str, images: Grey, labels: Iterable[int]) -> None:
    folder = root / "images" / name
    folder.mkdir(parents=True)
    (root / "lists").mkdir(exist_ok=True)
    lines = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / f"{number:04}.png")
        lines.append(f"{name}/{number:04}.png {label}\n")
    (root / "lists" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def _ood(images: Grey) -> Labelled:
    return images, np.full(len(images), -1)


def _enlarged(images: NDArray[np.float64]) -> Grey:
    """8x8 images with levels 0 to 16, upscaled by bilinear interpolation."""
    grey = (images * 255 / 16).round().astype(np.uint8)
    large = [Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for i in grey]
    return np.stack([np.asarray(image) for image in large])


def _patches(photograph: NDArray[np.uint8], rng: np.random.Generator) -> Grey:
    """Random greyscale patches of a photograph."""
    grey = photograph.mean(axis=2).round().astype(np.uint8)
    rows, columns = (side - SIZE + 1 for side in grey.shape)
    y, x = rng.integers(0, rows, FAR_IMAGES), rng.integers(0, columns, FAR_IMAGES)
    return np.stack([grey[i : i + SIZE, j : j + SIZE] for i, j in zip(y, x, strict=True)])


def _stripes(rng: np.random.Generator) -> Grey:
    """Sine waves of random direction, wavelength (4 to 24 pixels) and phase."""
    y, x = np.mgrid[:SIZE, :SIZE]
    low, high = [0, 4, 0], [np.pi, SIZE, 2 * np.pi]
    angle, length, phase = rng.uniform(low, high, (FAR_IMAGES, 3)).T[..., None, None]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    found: Grey = (127.5 + 127.5 * wave).round().astype(np.uint8)
    return found
