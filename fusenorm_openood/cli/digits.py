"""`fusenorm digits`: write the digits benchmark and train its network."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.evaluation.runs import find_checkpoints
from fusenorm_openood.storage.files import alone_in, check_writable
from fusenorm_openood.training.loop import train_digits
from fusenorm_openood.training.recipes import METHODS, find_recipe


def add_arguments(parser: ArgumentParser) -> None:
    options.add(parser, "--data-root")
    options.add(
        parser,
        "--root",
        required=False,
        help="folder of training runs (default: one under results/)",
    )
    options.add(parser, "--seed", "--no-progress")


def run(args: Namespace) -> int:
    """Write the images and train the network where they are missing; print the checkpoint."""
    root = Path(args.root or Path("results", _root_of("base")))
    check_writable(root, "--root")
    best = train_digits(args.data_root, root, args.seed, progress=not args.no_progress)
    print(f"network: {best}")
    return 0


def ensure_digits(data_root: str, root: str | None, progress: bool = False) -> None:
    """Create what the digits benchmark is missing: its images, and a network under `root`.

    A network is only trained under a root that has the name of a recipe of the digits.

    Raises:
        CheckpointError: a root of another name without a checkpoint.
    """
    with alone_in(Path(data_root)):
        if root is not None:
            try:
                find_checkpoints(root)
            except CheckpointError as error:
                methods, name = {_root_of(m): m for m in METHODS}, Path(root).resolve().name
                if name not in methods:
                    raise CheckpointError(
                        f"{error}; a network for the digits is trained for --root "
                        f"{' or '.join(f'results/{known}' for known in methods)}"
                    ) from None
                check_writable(Path(root), "--root")
                train_digits(data_root, root, method=methods[name], progress=progress)
        write_digits(data_root)


def _root_of(method: str) -> str:
    return find_recipe("digits", method=method).run_name.partition("/")[0]
