"""Finds the subcommand, runs it, and turns errors into one sentence and an exit status."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fusenorm_openood import __version__
from fusenorm_openood.errors import FuseNormError

# Each is a module of this package with ``add_arguments(parser)`` and ``run(args) -> int``.
COMMANDS = {
    "eval": "near-OOD and far-OOD table of a root of training runs",
    "digits": "write the digits benchmark and train its network",
    "compare": "one table of many methods on many roots of training runs",
    "train": "train a network by T2FNorm or by cross-entropy",
    "taps": "modules of a checkpoint's network that can be tapped",
    "leaderboard": "entry for OpenOOD's leaderboard, from saved results",
    "doctor": "what is installed and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 0 = done, 1 = an error, told in one sentence on stderr, 130 = interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="fusenorm", description="OOD detection with FuseNorm.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if argv[:1] == [name]:  # only the one that runs is imported: most need torch
            command = import_module(f"fusenorm_openood.cli.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except FuseNormError as error:
        print(f"fusenorm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fusenorm: interrupted; every file that was written is complete", file=sys.stderr)
        return 130
    return status
