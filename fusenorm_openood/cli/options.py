"""Options that several subcommands share."""

from argparse import ArgumentParser, ArgumentTypeError


def add_data(parser: ArgumentParser) -> None:
    """`--id-data` and `--data-root`: the benchmark and its images."""
    names = "cifar10, cifar100, imagenet200, imagenet, digits"
    parser.add_argument("--id-data", default="cifar10", help=f"{names} (default: cifar10)")
    add_data_root(parser)


def add_data_root(parser: ArgumentParser) -> None:
    """`--data-root`: the folder of images and lists."""
    help = "images and lists in OpenOOD's layout (default: data)"
    parser.add_argument("--data-root", default="data", help=help)


def add_computing(parser: ArgumentParser) -> None:
    """`--device`, `--num-workers` and `--no-progress`: how images are processed."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--num-workers", type=whole, default=2, help="processes that load images (default: 2)")
    add_no_progress(parser)


def add_no_progress(parser: ArgumentParser) -> None:
    """`--no-progress`."""
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def add_results(parser: ArgumentParser) -> None:
    """`--root`, `--postprocessor`, `--fsood` and `--output-dir`: which results."""
    add = parser.add_argument
    add("--root", required=True, help="folder of training runs s0, s1, ... with best.ckpt")
    add(
        "--postprocessor",
        help="fusenorm (default), fusenorm_published, fusenorm_joint, t2fnorm, msp, mls, ebo, odin, "
        "react, knn, nci, gen, fdbd, scale, ash, vim, mds, she; with OpenOOD, also any of OpenOOD's",
    )
    add("--fsood", action="store_true", help="full-spectrum: covariate-shifted images count as ID")
    add("--output-dir", help="folder for results (default: the root)")


def whole(text: str, least: int = 0) -> int:
    """An integer >= `least`, for argparse."""
    if not (text.isdecimal() and int(text) >= least):
        raise ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An integer >= 1, for argparse."""
    return whole(text, least=1)
