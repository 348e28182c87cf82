"""The embedded benchmark: images that ship inside scikit-learn, written in OpenOOD's layout.

ID are the handwritten digits 0 to 6. Digit 7 is the OOD validation set, 8 and 9 are near-OOD.
Far-OOD are patches of scikit-learn's two photographs, uniform noise, and stripes. All images are
8x8 pixels of 17 grey levels, so that no trace of format or resolution tells them apart.
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
from fusenorm_openood.errors import DataError

Grey = NDArray[np.uint8]  # [N, 8, 8], levels 0 to 16
Labelled = tuple[Grey, NDArray[np.int64]]

ID_CLASSES = 7
FAR_IMAGES = 400


def digits_image_sets(seed: int = 0) -> dict[str, Labelled]:
    """Images and labels of every list of the benchmark, the same for the same seed."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.int64)

    sets: dict[str, Labelled] = {}
    known = rng.permutation(np.flatnonzero(labels < ID_CLASSES))
    train, val = int(0.6 * len(known)), int(0.75 * len(known))
    for split, chosen in zip(("train", "val", "test"), np.split(known, [train, val]), strict=True):
        sets[f"{split}_digits"] = images[chosen], labels[chosen]
    for name, digit in (("val_digit7", 7), ("test_digit8", 8), ("test_digit9", 9)):
        sets[name] = _ood(images[labels == digit])
    china, flower = load_sample_images().images
    sets["test_china"] = _ood(_patches(china, rng))
    sets["test_flower"] = _ood(_patches(flower, rng))
    sets["test_noise"] = _ood(rng.integers(0, 17, (FAR_IMAGES, 8, 8), dtype=np.uint8))
    sets["test_stripes"] = _ood(_stripes(rng))
    return sets


def write_digits(data_root: str | Path, seed: int = 0) -> None:
    """Write the benchmark's images and lists under a data root, unless they are all there.

    Raises:
        DataError: the data root cannot be written.
    """
    if not load_benchmark("digits", data_root).missing():
        return
    root = Path(data_root)
    lists, images = root / "benchmark_imglist" / "digits", root / "images_digits"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".digits-") as unfinished:
            for name, (grey, labels) in digits_image_sets(seed).items():
                _write(Path(unfinished), name, grey, labels)
            for folder, made in ((images, "images"), (lists, "lists")):
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                (Path(unfinished) / made).rename(folder)
    except OSError as error:
        raise DataError(
            f"the digits benchmark cannot be written under {root} ({error}): "
            "give --data-root a folder that can be"
        ) from None


def _write(root: Path, name: str, images: Grey, labels: Iterable[int]) -> None:
    folder = root / "images" / name
    folder.mkdir(parents=True)
    (root / "lists").mkdir(exist_ok=True)
    lines = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{number:04}.png")
        lines.append(f"{name}/{number:04}.png {label}\n")
    (root / "lists" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def _ood(images: Grey) -> Labelled:
    return images, np.full(len(images), -1)


def _patches(photograph: NDArray[np.uint8], rng: np.random.Generator) -> Grey:
    """Random 8x8 patches of a photograph, four of its pixels averaged into each of theirs."""
    grey = photograph.mean(axis=2)
    rows, columns = (side // 4 for side in grey.shape)
    small = grey[: 4 * rows, : 4 * columns].reshape(rows, 4, columns, 4).mean(axis=(1, 3))
    y = rng.integers(0, rows - 7, FAR_IMAGES)
    x = rng.integers(0, columns - 7, FAR_IMAGES)
    patches = np.stack([small[i : i + 8, j : j + 8] for i, j in zip(y, x, strict=True)])
    return np.round(patches * 16 / 255).astype(np.uint8)


def _stripes(rng: np.random.Generator) -> Grey:
    """Sine waves of random direction, wavelength and phase."""
    y, x = np.mgrid[:8, :8]
    angle, length, phase = rng.uniform([0, 2.5, 0], [np.pi, 8, 2 * np.pi], (FAR_IMAGES, 3)).T[
        ..., None, None
    ]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    grey: Grey = np.round(8 + 8 * wave).astype(np.uint8)
    return grey
