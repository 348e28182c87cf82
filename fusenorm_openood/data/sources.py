"""The benchmarks' names, their lists on disk, and where to get them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusenorm_openood.configs import config_root, read_config

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
    paths = [
        under(data_root, value)
        for file in sorted((config_root() / "datasets" / name).glob("*.yml"))
        for value in _values(read_config(file), "imglist_pth")
    ]
    return list(dict.fromkeys(paths))


def under(data_root: str | Path, path: str) -> Path:
    """A path from the configurations, which starts with ./data, under another data root."""
    return Path(data_root) / Path(path).relative_to("data")


def _values(config: Any, key: str) -> Iterator[str]:
    for name, value in config.items() if isinstance(config, dict) else ():
        if name == key:
            yield value
        yield from _values(value, key)
