"""The benchmarks: which images are ID, near-OOD, far-OOD and covariate-shifted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fusenorm_openood.data import preprocessing
from fusenorm_openood.data.lists import CpuLoader, ImageList
from fusenorm_openood.errors import ConfigError, DataError, unknown
from fusenorm_openood.storage.configs import config_root, lookup, read_config

_DRIVE = "https://drive.google.com/file/d/"
# Checkpoints of three training runs each: with cross-entropy, and with T2FNorm.
CHECKPOINTS = {
    "cifar10": ("1byGeYxM_PlLjT72wZsMQvP6popJeWBgt", "1FchVmaDodfsSE-eyA6FjnEZ7FtFm0v4u"),
    "cifar100": ("1s-1oNrRtmA0pGefxXJOUVRYpaoAML0C-", "16bEDcPPjPkt4KmnqurfGnI6gPLIwZJc8"),
    "imagenet200": ("1ddVmwc8zmzSjdLUO84EuV4Gz1c7vhIAs", "1i6Rsb11yr0cP6grjtyQI23sYfSH3fBBH"),
    "imagenet": ("15PdDMNRfnJ7f2oxW6lI-Ge4QJJH3Z0Fy", "1vEfGSg0sIONLYu2XXxWixRAtE5YYVeUw"),
}
DOWNLOAD = (
    "in a checkout of https://github.com/Jingkang50/OpenOOD run 'python "
    "scripts/download/download.py --contents datasets checkpoints --datasets ood_v1.5 "
    "--checkpoints ood_v1.5 --save_dir ./data ./results --dataset_mode benchmark'"
)


def how_to_get(name: str) -> str:
    """How to get the images, lists and checkpoints of a benchmark."""
    if name == "digits":
        return "create the benchmark and its network with 'fusenorm digits'"
    openood, t2fnorm = (f"{_DRIVE}{file}" for file in CHECKPOINTS[name])
    return (
        f"get images, lists and checkpoints with OpenOOD's download script: {DOWNLOAD}; "
        f"the checkpoints alone are at {openood} (cross-entropy) and {t2fnorm} (T2FNorm)"
    )


def benchmark_names() -> list[str]:
    """Names of the ID data sets that have a benchmark."""
    return sorted(path.parent.name for path in (config_root() / "datasets").glob("*/*_ood.yml"))


def list_paths(name: str, data_root: str | Path) -> list[Path]:
    """All image lists of a benchmark, whether or not they exist."""
    benchmark = load_benchmark(name, data_root)
    return list(dict.fromkeys(image_set.imagelist for image_set in benchmark.every()))


@dataclass(frozen=True)
class ImageSet:
    """An image list, the folder that its paths are relative to, and the transform."""

    imagelist: Path
    data_dir: Path
    transform: preprocessing.Transform

    def images(self) -> ImageList:
        return ImageList(self.imagelist, self.data_dir, self.transform)


@dataclass(frozen=True)
class Benchmark:
    """An ID data set with everything that OpenOOD tests it against."""

    name: str
    data_root: Path
    num_classes: int
    pre_size: int
    image_size: int
    norm: preprocessing.Normalization
    id: dict[str, ImageSet]
    val_ood: ImageSet
    near: dict[str, ImageSet]
    far: dict[str, ImageSet]
    csid: dict[str, ImageSet]

    def groups(
        self, fsood: bool = False, validation: bool = False
    ) -> dict[str, dict[str, ImageSet]]:
        """The image sets that are tested, by group and name; `validation`: the validation pair."""
        return {
            "id": {self.name: self.id["val" if validation else "test"]},
            "csid": self.csid if fsood else {},
            "valood": {"val": self.val_ood} if validation else {},
            "nearood": {} if validation else self.near,
            "farood": {} if validation else self.far,
        }

    def tested(self, fsood: bool = False, validation: bool = False) -> list[ImageSet]:
        """The image sets that an evaluation reads, the one that it fits on first."""
        groups = self.groups(fsood, validation).values()
        return list(dict.fromkeys((self.id["val"], *chain(*(g.values() for g in groups)))))

    def every(self, fsood: bool = True) -> Iterator[ImageSet]:
        """All image sets of the benchmark, with or without the covariate-shifted ones."""
        yield from (self.id["train"], self.val_ood, *self.tested(fsood))

    def check_labels(self, image_sets: Iterable[ImageSet]) -> None:
        """Raise DataError if an ID image, covariate-shifted or not, is of none of the classes."""
        labelled = (*self.id.values(), *self.csid.values())
        for image_set in image_sets:
            if image_set in labelled:
                image_set.images().check_labels(self.num_classes)

    def missing(self, image_sets: Iterable[ImageSet]) -> list[str]:
        """A message for each image set that is incomplete on disk; no image is read."""
        problems = []
        for image_set in image_sets:
            try:
                problems.append(image_set.images().first_missing())
            except DataError as error:
                problems.append(str(error))
        return [problem for problem in problems if problem]


def load_benchmark(
    name: str,
    data_root: str | Path = "data",
    normalization: preprocessing.Normalization | None = None,
    fsood: bool = False,
) -> Benchmark:
    """The benchmark of an ID data set, with images under a data root in OpenOOD's layout.

    `normalization` is the channel mean and standard deviation of the images that the network was
    trained on; None = OpenOOD's for this data set. ConfigError for an unknown name, and with
    `fsood` for a benchmark without covariate-shifted ID images.
    """
    folder = config_root() / "datasets" / name
    if name not in benchmark_names():
        raise ConfigError(unknown("ID data set", name, benchmark_names()))
    dataset = lookup(read_config(folder / f"{name}.yml"), "dataset")
    ood = lookup(read_config(folder / f"{name}_ood.yml"), "ood_dataset")
    shifted = folder / f"{name}_fsood.yml"
    csid = lookup(read_config(shifted), "ood_dataset", "csid") if shifted.is_file() else None
    if fsood and csid is None:
        raise ConfigError(f"{name} has no covariate-shifted ID images: leave out --fsood")
    norm = normalization or preprocessing.parse_normalization(lookup(dataset, "normalization_type"))
    pre_size, image_size = lookup(dataset, "pre_size"), lookup(dataset, "image_size")

    def image_set(split: Any, label: str) -> ImageSet:
        # Images of ImageNet-C already have their final size.
        sizes = None if label == "imagenet_c" else (pre_size, image_size)
        # The configurations' paths start with ./data.
        imagelist, data_dir = (
            Path(data_root) / Path(lookup(split, key)).relative_to("data")
            for key in ("imglist_pth", "data_dir")
        )
        return ImageSet(imagelist, data_dir, preprocessing.EvalTransform(norm, sizes))

    def image_sets(split: Any) -> dict[str, ImageSet]:
        return {key: image_set(split[key], key) for key in lookup(split, "datasets")}

    return Benchmark(
        name=name,
        data_root=Path(data_root),
        num_classes=lookup(dataset, "num_classes"),
        pre_size=pre_size,
        image_size=image_size,
        norm=norm,
        id={key: image_set(dataset[key], key) for key in ("train", "val", "test")},
        val_ood=image_set(lookup(ood, "val"), "val"),
        near=image_sets(lookup(ood, "nearood")),
        far=image_sets(lookup(ood, "farood")),
        csid=image_sets(csid) if csid is not None else {},
    )


def image_loader(image_set: ImageSet, batch_size: int = 200, num_workers: int = 0) -> CpuLoader:
    """Batches of an image set in the order of its list, in pinned memory if CUDA is available."""
    pinned = torch.cuda.is_available()
    return CpuLoader(image_set.images(), batch_size, num_workers=num_workers, pin_memory=pinned)
