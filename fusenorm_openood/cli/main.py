"""Find the subcommand, run it, and turn errors into one sentence and an exit status."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fusenorm_openood import __version__
from fusenorm_openood.cli.output import shown_warnings, tolerant_output
from fusenorm_openood.errors import FuseNormError, is_lost_loader

# Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "eval": "near-OOD and far-OOD table of a root of training runs",
    "digits": "write the digits benchmark and train its network",
    "compare": "one table of several methods on several roots of training runs",
    "train": "train a network with T2FNorm or cross-entropy",
    "fit": "fit a detector to a network and ID images, and keep it in a file",
    "score": "confidences, p-values and verdicts of image files",
    "report": "HTML page about image files that were judged before",
    "export": "a detector and its network as one program for ONNX or torch.export",
    "taps": "list the modules of a checkpoint's network that can be tapped",
    "store": "list, verify and prune stored scores",
    "leaderboard": "rows for OpenOOD's leaderboard, from saved results",
    "doctor": "what is installed and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 0 = success, 1 = error, reported on stderr, 130 = interrupted.
    """
    with tolerant_output(), shown_warnings():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="fusenorm", description="OOD detection with FuseNorm.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = commands.add_parser(name, help=summary, description=description)
        if argv[:1] == [name]:  # import only the one that runs: most need torch
            command = import_module(f"fusenorm_openood.cli.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except FuseNormError as error:
        print(f"fusenorm: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not is_lost_loader(error):
            raise
        reason = str(error).strip().rstrip(".") or type(error).__name__
        print(
            f"fusenorm: a loader process ended ({reason}); finished shards are kept: memory is the "
            "usual reason, so choose fewer with --num-workers",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("fusenorm: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    return status
