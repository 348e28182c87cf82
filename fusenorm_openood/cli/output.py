"""Standard output and error that cannot stop a command: ASCII terminals, closed pipes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class _Tolerant:
    """A stream that writes `?` for what its encoding lacks, and nothing into a closed pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._may_be_closed():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._may_be_closed():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _may_be_closed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # from now on, and at the exit of Python, nothing is written
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Context in which no print fails, so that a command finishes and saves its files."""
    out, err = _Tolerant(sys.stdout), _Tolerant(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()
