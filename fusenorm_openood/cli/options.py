"""Options that several subcommands share."""

from argparse import ArgumentParser, ArgumentTypeError
from typing import Any

from fusenorm_openood.errors import ConfigError


def add_data(parser: ArgumentParser) -> None:
    """`--id-data` and `--data-root`: the benchmark and its images."""
    names = "cifar10, cifar100, imagenet200, imagenet, digits"
    parser.add_argument("--id-data", default="cifar10", help=f"{names} (default: cifar10)")
    add_data_root(parser)


def add_data_root(parser: ArgumentParser) -> None:
    """`--data-root`: the folder of images and lists."""
    help = "images and lists in OpenOOD's layout (default: data)"
    parser.add_argument("--data-root", default="data", help=help)


def add_network(parser: ArgumentParser) -> None:
    """`--network`: the architecture of checkpoints that are not recognised by their keys."""
    parser.add_argument(
        "--network",
        metavar="SPEC",
        help="architecture of the checkpoints: torchvision:NAME, timm:NAME or "
        "package.module:factory (default: recognised by their keys)",
    )


def add_normalization(parser: ArgumentParser) -> None:
    """`--normalization`: how images are normalised for networks not trained with OpenOOD's."""
    parser.add_argument(
        "--normalization",
        type=_normalization,
        help="channel statistics that the networks were trained with: cifar10, cifar100, imagenet, "
        "digits, or mean and standard deviation as M,M,M,S,S,S (default: OpenOOD's for the data)",
    )


def add_bits(parser: ArgumentParser) -> None:
    """`--bits`: how 16-bit images are scaled."""
    parser.add_argument(
        "--bits",
        type=whole,
        help="bits per pixel of 16-bit images that do not say it themselves, 12 for example",
    )


def add_computing(parser: ArgumentParser) -> None:
    """`--device`, `--num-workers` and `--no-progress`: how images are processed."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--num-workers", type=whole, default=2, help="processes that load images (default: 2)")
    add_no_progress(parser)


def add_store(parser: ArgumentParser) -> None:
    """`--store`: where scores are kept."""
    parser.add_argument(
        "--store",
        default="results/store",
        metavar="DIR",
        help="keep what the network says of each image in this folder, so that it is never asked "
        "twice; none = keep nothing (default: results/store)",
    )


def add_no_progress(parser: ArgumentParser) -> None:
    """`--no-progress`."""
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def add_results(parser: ArgumentParser) -> None:
    """`--root`, `--postprocessor`, `--fsood` and `--output-dir`: which results."""
    add = parser.add_argument
    add(
        "--root",
        required=True,
        help="folder of training runs s0, s1, ... with best.ckpt, or one checkpoint file",
    )
    add(
        "--postprocessor",
        help="fusenorm (default), fusenorm_published, fusenorm_joint, t2fnorm, msp, mls, ebo, "
        "odin, react, knn, nci, gen, fdbd, scale, ash, vim, mds, she; with OpenOOD, also any of "
        "OpenOOD's",
    )
    add("--fsood", action="store_true", help="full-spectrum: covariate-shifted images count as ID")
    add(
        "--output-dir",
        help="folder for results (default: the root, or a checkpoint file's name without suffix)",
    )


def whole(text: str, least: int = 0) -> int:
    """An integer >= `least`, for argparse."""
    if not (text.isdecimal() and int(text) >= least):
        raise ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
    return int(text)


def _normalization(text: str) -> Any:
    from fusenorm_openood.data.preprocessing import parse_normalization  # imports torch

    try:
        return parse_normalization(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """An integer >= 1, for argparse."""
    return whole(text, least=1)


def share(text: str) -> float:
    """A number in (0, 1), for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ArgumentTypeError(f"must be a number in (0, 1), got {text!r}")
    return value
