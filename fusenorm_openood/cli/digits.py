"""`fusenorm digits`: write the digits benchmark and train its network."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.storage.files import check_writable
from fusenorm_openood.training.loop import train_digits
from fusenorm_openood.training.recipes import find_recipe


def add_arguments(parser: ArgumentParser) -> None:
    options.add_data_root(parser)
    parser.add_argument("--root", help="folder of training runs (default: one under results/)")
    parser.add_argument("--seed", type=options.whole, default=0, help="random seed (default: 0)")
    options.add_no_progress(parser)


def run(args: Namespace) -> int:
    """Write the images and train the network where they are missing; print the checkpoint."""
    root = Path(args.root or Path("results") / Path(find_recipe("digits").run_name).parent)
    check_writable(root, "--root")
    best = train_digits(args.data_root, root, args.seed, progress=not args.no_progress)
    print(f"network: {best}")
    return 0
