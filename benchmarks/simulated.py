"""Simulated images and networks for OpenOOD's ImageNet benchmarks: its lists and counts, no data.

Images are cut from scikit-learn's two photographs and resized; networks have random weights.
"""

import math
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.evaluation.leaderboard import FULL_SIZES
from fusenorm_openood.network import ResNet18_224x224, ResNet50, T2FNormNet

# Lists that FULL_SIZES, whose source is stated there, does not have. Validation OOD images: counted
# in a public copy of OpenOOD's lists (moxime/ooddict). ImageNet-1k: training images of ILSVRC 2012.
# Assumed: ImageNet-200, whose 200 classes have at most 1,300 training images each; ImageNet-ES, all
# of its test images, 1,000 objects in two lights with 5 + 27 settings of the camera.
OTHER_SIZES = {
    "val_openimage_o": 1763,
    "train_imagenet": 1_281_167,
    "train_imagenet200": 260_000,
    "test_imagenet_es": 64_000,
}
# Typical width and height; ImageNet's mean is about 500 x 375. OpenImage-O and iNaturalist are at
# most 1,024 and 800 pixels long, Textures 300 to 640; ImageNet-C is cropped already.
USUAL = (500, 375)
LARGER = {
    "test_inaturalist": (800, 600),
    "val_openimage_o": (1024, 768),
    "test_openimage_o": (1024, 768),
    "test_textures": (500, 450),
}
CROPPED = 224
LEAST = 10  # validation images: a detector cannot be fitted on fewer
QUALITY = 95  # of the JPEG files; photographs that are enlarged take fewer bytes than others
NETWORKS = {"imagenet200": ResNet18_224x224, "imagenet": ResNet50}
TAU = {"imagenet200": 0.1, "imagenet": 0.05}


def full_count(benchmark: str, imagelist: str) -> int:
    """Number of images of a list in OpenOOD, or as it is assumed above."""
    return FULL_SIZES[benchmark].get(imagelist) or OTHER_SIZES[imagelist]


@cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def simulated_image(imagelist: str, number: int) -> Image.Image:
    """An image of the size that is typical of a list, the same for the same number."""
    rng = np.random.default_rng([crc32(imagelist.encode()), number])
    photograph = photographs()[number % 2]
    width, height = CROPPED, CROPPED
    if not imagelist.endswith("_c"):
        usual = LARGER.get(imagelist, USUAL)
        width, height = (round(side * math.exp(rng.normal(0, 0.15))) for side in usual)
        if rng.random() < 0.25:  # portrait
            width, height = height, width
    part = min(photograph.width / width, photograph.height / height) * rng.uniform(0.6, 1)
    left = rng.uniform(0, photograph.width - part * width)
    top = rng.uniform(0, photograph.height - part * height)
    box = left, top, left + part * width, top + part * height
    return photograph.resize((width, height), Image.Resampling.BICUBIC, box)


def write_images(benchmark: Benchmark, image_set: ImageSet, share: float) -> int:
    """Write a list with a share of its images, rounded up, and these; returns their number."""
    name = image_set.imagelist.stem
    known = image_set in (*benchmark.id.values(), *benchmark.csid.values())
    count = math.ceil(full_count(benchmark.name, name) * share)
    if name.startswith("val_"):
        count = max(LEAST, count)
    (image_set.data_dir / name).mkdir(parents=True, exist_ok=True)
    image_set.imagelist.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        file = f"{name}/{number:07d}.jpg"
        path = image_set.data_dir / file
        if not path.exists():
            simulated_image(name, number).save(path, quality=QUALITY)
        lines.append(f"{file} {number % benchmark.num_classes if known else -1}\n")
    image_set.imagelist.write_text("".join(lines))
    return count


def write_network(benchmark: Benchmark, kind: str, root: Path) -> Path:
    """Write a network of random weights as a training run under a root; returns its checkpoint.

    Its batch norms have the statistics of validation images, so that features are of usual size.

    Args:
        benchmark: the benchmark, whose images exist.
        kind: `base` or `t2fnorm`.
        root: folder of training runs.
    """
    torch.manual_seed(0)
    backbone = NETWORKS[benchmark.name](benchmark.num_classes)
    images = benchmark.id["val"].images()
    few = torch.stack([images[number]["data"] for number in range(min(8, len(images)))])
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average over all batches
    with torch.no_grad():
        backbone.train()(few)
    net: nn.Module = backbone
    if kind == "t2fnorm":
        net = T2FNormNet(backbone, benchmark.num_classes)
        net.set_tau(TAU[benchmark.name])
    path = root / "s0" / "best.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return path
