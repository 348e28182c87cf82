"""Standard output and error in ASCII terminals, closed pipes and on full disks."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from fusenorm_openood.errors import UnwritableError

_PACKAGE = str(Path(__file__).parents[1])


class _Tolerant:
    """A stream that writes `?` for what its encoding lacks, and nothing into a closed pipe.

    Args:
        stream: the stream.
        name: what an UnwritableError calls it if its disk is full; None = raise none.
    """

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        with self._may_fail():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._may_fail():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # from now on, and at the exit of Python, nothing is written
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._name and not isinstance(error, BrokenPipeError):
                raise UnwritableError(error.errno, error.strerror, self._name) from None


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Context in which this package's warnings are one sentence, unless Python was told otherwise.

    Other code may have turned off all warnings.
    """
    usual = warnings.formatwarning

    def sentence(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> str:
        own = filename.startswith(_PACKAGE)
        return (
            f"fusenorm: {message}\n" if own else usual(message, category, filename, *where, **more)
        )

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("default", category=UserWarning, module="fusenorm_openood")
        warnings.formatwarning = sentence
        try:
            yield
        finally:
            warnings.formatwarning = usual


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
