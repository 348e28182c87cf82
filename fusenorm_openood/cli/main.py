"""The command `fusenorm`."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from fusenorm_openood import __version__
from fusenorm_openood.errors import FuseNormError, UnwritableError, is_lost_loader, unknown


class Command(NamedTuple):
    """A subcommand: the module with its `add_NAME(parser)` and `run_NAME(args) -> int`."""

    module: str
    summary: str


COMMANDS = {
    "eval": Command("eval", "near-OOD and far-OOD table of a root of training runs"),
    "digits": Command("train", "write the digits benchmark and train its network"),
    "compare": Command("compare", "one table of several methods on several roots of training runs"),
    "train": Command("train", "train a network with T2FNorm or cross-entropy"),
    "fit": Command("fit", "fit a detector to a network and ID images, and save it in a file"),
    "calibrate": Command("fit", "calibrate a detector's file on other ID images, without a fit"),
    "score": Command("score", "confidences, p-values and verdicts of image files"),
    "report": Command("score", "HTML page about image files that were judged before"),
    "watch": Command("watch", "alarm for drift in the rows of `fusenorm score`"),
    "export": Command("export", "a detector and its network as one program for a runtime"),
    "recalibrate": Command("export", "calibrate an exported program after it was quantised"),
    "taps": Command("taps", "list the modules of a checkpoint's network that can be layers"),
    "store": Command("store", "list, verify and prune stored scores"),
    "leaderboard": Command("eval", "rows for OpenOOD's leaderboard, from saved results"),
    "doctor": Command("doctor", "what is installed and what is missing"),
}
_PACKAGE = str(Path(__file__).parents[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0 = success, 1 = error, reported on stderr, 130 = interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:  # set by the shell, for the extra `completion`
        import_module("argcomplete").autocomplete(_parser(os.environ["COMP_LINE"].split()[1:2]))
    with tolerant_output(), own_warnings(), own_messages(), quiet_loaders():
        args = _parsed(argv)
        try:
            status: int = args.run(args)
            sys.stdout.flush()
            return status
        except FuseNormError as error:
            print(f"fusenorm: {error}", file=sys.stderr)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not is_lost_loader(error):
                raise
            reason = str(error).strip().rstrip(".") or type(error).__name__
            print(
                f"fusenorm: a loader process ended ({reason}); finished shards are stored: memory "
                "is the usual reason, so choose fewer with --num-workers",
                file=sys.stderr,
            )
        except KeyboardInterrupt:
            print("fusenorm: interrupted; no file was left half-written", file=sys.stderr)
            return 130
        return 1


@contextmanager
def quiet_loaders() -> Iterator[None]:
    """Print nothing where a loader is freed whose processes have ended: an error says so."""
    usual = sys.unraisablehook

    def hook(found: Any) -> None:
        if "DataLoaderIter" not in getattr(found.object, "__qualname__", ""):
            usual(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; an unknown command or option ends with the nearest one that is known."""
    parser = _parser(argv[:1])
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        parser.error(unknown("command", argv[0], COMMANDS))
    args, rest = parser.parse_known_args(argv)
    for option in rest[:1]:
        near = get_close_matches(option.partition("=")[0], args.options, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return args


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusenorm", description="OOD detection with FuseNorm.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = commands.add_parser(name, help=summary, description=description)
        if name in chosen:  # import only the one that runs: most need torch
            add_command(name, subparser)
    return parser


def add_command(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of a subcommand, and what runs it."""
    module = import_module(f"fusenorm_openood.cli.{COMMANDS[name].module}")
    getattr(module, f"add_{name}")(parser)
    options = [option for action in parser._actions for option in action.option_strings]
    parser.set_defaults(run=getattr(module, f"run_{name}"), options=options)


@contextmanager
def own_warnings() -> Iterator[None]:
    """Show this package's warnings in one sentence each, unless Python's options say otherwise."""
    usual = warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> str:
        if filename.startswith(_PACKAGE):
            return f"fusenorm: {message}\n"
        return usual(message, category, filename, *where, **more)

    with warnings.catch_warnings():
        if not sys.warnoptions:  # other code may have turned off all warnings
            warnings.filterwarnings("default", category=UserWarning, module="fusenorm_openood")
        warnings.formatwarning = formatted
        try:
            yield
        finally:
            warnings.formatwarning = usual


@contextmanager
def own_messages() -> Iterator[None]:
    """Show on standard error what this package logs, unless its logger has been configured."""
    log, handler = logging.getLogger("fusenorm_openood"), _Messages()
    if log.handlers or log.level:
        yield
        return
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        log.propagate = propagate


class _Messages(logging.Handler):
    """Writes each message above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"fusenorm: {record.getMessage()}", file=sys.stderr)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Context in which no print fails, so that a command finishes and saves its files.

    On a full disk, a print to standard output or its flush raises UnwritableError.
    """
    out, err = _Tolerant(sys.stdout, "standard output"), _Tolerant(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            with suppress(UnwritableError):
                out.flush()
            err.flush()


class _Tolerant:
    """A stream that writes `?` for what its encoding lacks, and nothing into a closed pipe.

    If its disk is full, it raises an UnwritableError with its name, if it has one.
    """

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._try(self._stream.write, text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., object], *args: str) -> None:
        try:
            call(*args)
        except OSError as error:  # from now on, and at the exit of Python, nothing is written
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._name and not isinstance(error, BrokenPipeError):
                raise UnwritableError(error.errno, error.strerror, self._name) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
