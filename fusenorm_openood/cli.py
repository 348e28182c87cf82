"""The command ``fusenorm``."""

import argparse
import sys
from collections.abc import Sequence

from fusenorm_openood import __version__
from fusenorm_openood.errors import FuseNormError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0 = done, 1 = an error that stands in one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "doctor":  # works where torch does not
            from fusenorm_openood.doctor import doctor

            return doctor(args)
        # Subcommands import torch; --help and --version don't wait for it.
        from fusenorm_openood import commands

        getattr(commands, args.command)(args)
    except FuseNormError as error:
        print(f"fusenorm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fusenorm: interrupted; what was written is whole", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusenorm", description="OOD detection with FuseNorm.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _eval_arguments(
        commands.add_parser("eval", help="near-OOD and far-OOD table of a root of runs")
    )
    _digits_arguments(
        commands.add_parser("digits", help="write the digits benchmark and train on it")
    )
    _compare_arguments(
        commands.add_parser("compare", help="one table of many methods on many roots of runs")
    )
    _train_arguments(commands.add_parser("train", help="train a network, by T2FNorm or plainly"))
    _taps_arguments(commands.add_parser("taps", help="modules of a checkpoint that can be tapped"))
    _leaderboard_arguments(
        commands.add_parser(
            "leaderboard", help="entry of OpenOOD's leaderboard, from saved results"
        )
    )
    _doctor_arguments(commands.add_parser("doctor", help="what is installed, what is missing"))
    return parser


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--root", required=True, help="folder of training runs s0, s1, ... with best.ckpt")
    add(
        "--postprocessor",
        default="fusenorm",
        help="fusenorm, t2fnorm, msp, mls, ebo, odin, react; with OpenOOD, any of its own",
    )
    add("--id-data", default="cifar10", help="cifar10, cifar100, imagenet200, imagenet, digits")
    add("--batch-size", type=_positive, default=200)
    add(
        "--save-csv",
        action="store_true",
        help="write the table to OUTPUT/ood/NAME.csv (fsood/, val/)",
    )
    add("--save-score", action="store_true", help="write scores to OUTPUT/s0/scores/NAME.pkl")
    add("--fsood", action="store_true", help="count covariate-shifted ID images as ID")
    add("--validation", action="store_true", help="test on the validation pair, to choose settings")
    add("--compare", action="store_true", help="also print AUROC / FPR@95 of every expert")
    add("--data-root", default="data", help="images and lists in OpenOOD's layout (default: data)")
    add("--output-dir", help="where results go (default: the root)")
    add("--config", help="postprocessor YAML (default: this package's for the postprocessor)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one argument of it")
    add("--aps", action="store_true", help="search settings on the validation pair (APS_mode)")
    add("--sweep", action="append", default=[], metavar="KEY=LIST", help="values to add to it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=["bf16"], help="run the network in bfloat16 where it is safe")
    add("--channels-last", action="store_true", help="memory format of feature maps and weights")
    add("--num-workers", type=_whole, default=2, help="processes that load images (default: 2)")
    add("--engine", default="auto", choices=["auto", "native", "openood"], help="who evaluates")
    add("--no-progress", action="store_true", help="no progress bars")


def _digits_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--root", help="folder of training runs (default: under results/)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--root", required=True, nargs="+", help="folders of training runs, or checkpoints' own")
    add("--id-data", default="cifar10", help="cifar10, cifar100, imagenet200, imagenet, digits")
    add("--data-root", default="data", help="images and lists in OpenOOD's layout (default: data)")
    add("--config", help="YAML whose sweep is searched (default: this package's)")
    add("--batch-size", type=_positive, default=200)
    add("--csv", metavar="FILE", help="write the table to this file, too")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--num-workers", type=_whole, default=2, help="processes that load images (default: 2)")
    add("--no-progress", action="store_true", help="no progress bars")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--id-data", default="cifar10", help="cifar10, cifar100, imagenet200, imagenet, digits")
    add("--method", default="t2fnorm", help="t2fnorm, or base for cross-entropy alone")
    recipe = "(default: the published recipe of the data set)"
    add("--epochs", type=_positive, help=recipe)
    add("--lr", type=float, help=f"learning rate at the start {recipe}")
    add("--tau", type=float, help=f"T2FNorm's temperature {recipe}")
    add("--batch-size", type=_positive, help=f"of one process {recipe}")
    add("--seed", type=_whole, default=0)
    add("--init", metavar="CKPT", help="start from this checkpoint, plain or T2FNorm's")
    add("--data-root", default="data", help="images and lists in OpenOOD's layout (default: data)")
    add("--results-dir", default="results", help="where the run's folder goes (default: results)")
    add("--amp", choices=["bf16"], help="compute in bfloat16 where it is safe")
    add("--channels-last", action="store_true", help="memory format of images and weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--num-workers", type=_whole, default=2, help="processes that load images (default: 2)")
    add("--no-progress", action="store_true", help="no progress bar")


def _taps_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="best.ckpt of a training run")
    parser.add_argument("--image-size", type=_positive, default=32)


def _leaderboard_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--root", required=True, help="folder of training runs s0, s1, ... with best.ckpt")
    add("--postprocessor", default="fusenorm", help="whose CSV: OUTPUT/ood/POSTPROCESSOR.csv")
    add("--id-data", default="cifar10", help="cifar10, cifar100, imagenet200, imagenet, digits")
    add("--fsood", action="store_true", help="the full-spectrum results")
    add("--data-root", default="data", help="images and lists in OpenOOD's layout (default: data)")
    add("--output-dir", help="where results are (default: the root)")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-root", default="data", help="where images and lists are looked for (default: data)")
    add("--root", default="results", help="where training runs are looked for (default: results)")


def _whole(text: str, least: int = 0) -> int:
    if not (text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, least=1)


if __name__ == "__main__":
    sys.exit(main())
