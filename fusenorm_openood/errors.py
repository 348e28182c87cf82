"""Errors that users see, and the checks of numbers that they give."""

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from numbers import Integral, Real
from typing import Any

MOST = 60  # names in a message
OPENOOD = {"energy": "ebo"}  # its names for what papers and settings call otherwise


class FuseNormError(Exception):
    """Base class of all errors that this package raises deliberately."""


class ConfigError(FuseNormError, ValueError):
    """An invalid setting, configuration file or command-line value."""


class TapError(FuseNormError, ValueError):
    """A module that cannot be tapped, or that was never called."""


class NetworkError(TapError, RuntimeError):
    """The network itself fails on images, for example on ones with another number of channels."""


class NotFittedError(FuseNormError, RuntimeError):
    """A score was requested before the ID statistics were fitted."""


class NonFiniteError(FuseNormError, ValueError):
    """NaN or infinity in images, features or scores."""


class ZeroRangeError(FuseNormError, ValueError):
    """An expert that gives (almost) all ID images the same score, and so cannot be normalised."""


class DataError(FuseNormError, ValueError):
    """An image list, an image or a batch that cannot be read."""


class UnwritableError(FuseNormError, OSError):
    """A file that cannot be written, for example because the disk is full."""

    def __str__(self) -> str:
        reason = f"{self.filename} cannot be written ({self.strerror})"
        return f"{reason}: free disk space, or write elsewhere"


class RemoteError(FuseNormError, RuntimeError):
    """A URL that cannot be read now, which says nothing about what it names."""


class ClusterError(FuseNormError, RuntimeError):
    """A cluster that cannot be reached, lacks resources, or whose workers end again and again."""


class CheckpointError(FuseNormError, ValueError):
    """A checkpoint that is missing, damaged, or made for another network."""


class DamagedFileError(CheckpointError):
    """A file that is truncated or altered, or not a checkpoint at all."""


class OpenOODError(FuseNormError, RuntimeError):
    """OpenOOD is missing or broken, or does not support what was requested."""


class CalibrationError(FuseNormError, ValueError):
    """Calibration images that are missing, too few, or not new to the detector."""


class DetectorFileError(FuseNormError, ValueError):
    """A detector file that is missing, damaged, of a newer format, or of another network."""


class StoreError(FuseNormError, ValueError):
    """A set of stored scores that cannot be written or read, is incomplete, or has another key."""


class DamagedShardError(StoreError):
    """A stored shard that is truncated, altered or unreadable: delete it and compute it again."""


class ExportError(FuseNormError, RuntimeError):
    """A detector that cannot be exported, or whose exported program gives other confidences."""


def unknown(what: str, name: object, known: Iterable[object], of: str = "", more: str = "") -> str:
    """The message for a name that is not known, with the nearest one that is.

    >>> unknown("score", "enrgy", ["energy", "msp"])
    "unknown score 'enrgy' (did you mean 'energy'?): choose from energy, msp"
    >>> unknown("score", "energy", ["ebo", "msp"])
    "unknown score 'energy' (did you mean 'ebo'?): choose from ebo, msp"
    """
    names, asked = [str(n) for n in known], str(name)
    near = get_close_matches(asked, names, 1) or get_close_matches(asked.lower(), names, 1)
    near = near or [name for name in names if name == OPENOOD.get(asked.lower())]
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" * (len(names) > MOST))
    way_out = f"choose from {listed}" if names else "none exists"
    return f"unknown {what} {name!r}{of}{hint}: {way_out}{more}"


_INNER = re.compile(rf"{__package__}\.(?!cli\.)|contextlib$|torch\.")


def warn(text: str) -> None:
    """A UserWarning that points to the first line of a user, or of a command of this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _INNER.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


@contextmanager
def os_errors(
    kind: type[FuseNormError], what: str, way_out: str, *others: type[Exception]
) -> Iterator[None]:
    """Context in which an error of the file system, or one of `others`, is one of this package."""
    kinds: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{what} ({reason}): {way_out}") from None


def import_extra(
    module: str, what: str, extra: str, kind: type[FuseNormError] = ConfigError
) -> Any:
    """An optional module; an error of this kind, which names the extra, if it is missing."""
    package = module.partition(".")[0]
    try:
        import_module(package)
        return import_module(module)
    except ImportError as error:
        raise kind(
            f"{what} needs {package} ({error}): pip install 'fusenorm-openood[{extra}]'"
        ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory could not be allocated, on any device."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # torch's
        return True
    texts = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in texts)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, or of its cause, which torch wraps in a report."""
    cause = error.__cause__ or error
    sentence = re.split(r"[.!]\s|\n", str(cause).strip(), maxsplit=1)[0]
    return f"{type(cause).__name__}: {sentence}"


def is_lost_loader(error: BaseException | None) -> bool:
    """Whether an error says that a process of a data loader ended.

    PyTorch has no exception of its own for that, and none if it ends while it passes on a batch.
    """
    said = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker ")
    return said or isinstance(error, ConnectionError | EOFError)


LARGEST = sys.float_info.max  # a larger integer is no float


def number(value: Any) -> int | float | None:
    """A finite number as Python's int or float; None for anything else.

    Arrays and tensors without a dimension are numbers; a bool is not one.

    >>> import numpy as np
    >>> number(np.int64(5)), number(np.float32(0.5)), number(True), number(float("nan"))
    (5, 0.5, None, None)
    """
    if type(value) in (int, float):  # all that torch.compile is to see
        return value if abs(value) <= LARGEST else None
    if getattr(value, "ndim", None) == 0:  # of numpy or torch, neither of which is imported here
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    value = int(value) if isinstance(value, Integral) else float(value)
    return value if abs(value) <= LARGEST else None


def whole(value: Any) -> int | None:
    """As `number`, None for what is no integer."""
    found = number(value)
    return found if isinstance(found, int) else None


def numbers(values: Any) -> tuple[int | float, ...] | None:
    """A sequence of numbers, perhaps an array or a tensor `[N]`; None if an item is no number."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence):
        return None
    found = tuple(n for n in map(number, values) if n is not None)
    return found if len(found) == len(values) else None
