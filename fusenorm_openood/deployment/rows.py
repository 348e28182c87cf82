"""Files with one row for each judged image, CSV or Parquet, that an interruption leaves usable."""

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.errors import ConfigError, DataError, os_errors
from fusenorm_openood.storage.files import import_parquet, lock, unlock, write_whole

AT_ONCE = 10_000  # rows in memory
NUMBERS = ("confidence", "p_value", "bound")
_HEADER = ",".join(Judged._fields).encode()


class RowFile:
    """Rows of `Judged` in a file, written as they come; for use in a `with` block.

    A Parquet file can only be written whole, so that its rows wait in a CSV file beside it, with
    `.part` at the end of its name, until `finish`. Bytes of file names that are not UTF-8 are
    written as `\\xe9`, for example, and read back as they were.

    Without a path, the rows go to standard output; `resume` goes on with those that the file has,
    and removes one that was cut short. ConfigError for `resume` without a file, for a file that
    cannot be written or is being written, and for Parquet without pyarrow; DataError for `resume`
    with a file that is something else.
    """

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        self.path, self.judged = path, set[str]()  # `judged`: the paths in rows of an earlier run
        self.readable: Judged | None = None  # the last of these whose image could be judged
        self._lock: int | None = None
        self._undecided = False  # whether rows wait for their verdicts
        if path is None and resume:
            raise ConfigError("--resume goes on with a file: give --csv FILE")
        self._rows = path
        if path is not None and is_parquet(path):
            import_parquet()
            self._rows = path.with_name(f"{path.name}.part")
        try:
            self._file = sys.stdout if self._rows is None else self._opened(self._rows, resume)
        except (OSError, DataError) as error:
            unlock(self._lock)
            if isinstance(error, BlockingIOError):
                why = "is being written by another run: wait for it, or give another file to --csv"
            elif isinstance(error, OSError):
                why = f"cannot be written ({error.strerror}): give another file to --csv"
            else:
                raise
            raise ConfigError(f"{path} {why}") from None
        self._writer = csv.writer(_Lines(self._file))
        if not self.judged:
            with self._writing():
                self._writer.writerow(Judged._fields)

    def write(self, rows: Sequence[Judged]) -> None:
        """Append rows; they are in the file when this returns.

        DataError if the disk is full, UnwritableError if it is that of standard output.
        """
        with self._writing():
            self._writer.writerows(map(_cells, rows))
            self._file.flush()
        self._undecided |= any(r.ood is None and r.p_value is not None for r in rows)

    def finish(self, verdicts: Callable[[NDArray[np.float64]], NDArray[np.bool_]] | None) -> None:
        """Give all rows their verdicts, also those of an earlier run, and make the file whole.

        `verdicts` says whether images with p-values `[N]` are OOD; None = as they are. DataError if
        the disk is full; the rows stay.
        """
        if self.path is None or self._rows is None:
            return
        with self._writing():
            self._file.close()
        if self._rows == self.path and not self.judged and not self._undecided:
            return
        rows = read_rows(self._rows)
        if verdicts is not None:
            p = np.array([row.p_value for row in read_rows(self._rows) if row.p_value is not None])
            ood = iter(verdicts(p).tolist())
            rows = (r if r.p_value is None else r._replace(ood=next(ood)) for r in rows)
        write = _write_parquet if is_parquet(self.path) else _write_csv
        with self._writing():
            write_whole(self.path, lambda file: write(file, rows))
            if self._rows != self.path:
                self._rows.unlink()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not sys.stdout:
            with suppress(OSError):  # of rows that `write` has failed to write
                self._file.close()
        unlock(self._lock)

    def _opened(self, rows: Path, resume: bool) -> IO[str]:
        """The file of rows, locked; with `resume`, with those that it has."""
        self._lock = lock(rows)
        if resume:
            if rows != self.path and not rows.stat().st_size and self.path and self.path.exists():
                _write_csv(rows, read_rows(self.path))
            _cut_to_whole_rows(rows)
            for row in read_rows(rows) if rows.stat().st_size else ():
                self.judged.add(row.path)
                self.readable = row if row.error is None else self.readable
        return rows.open("a" if self.judged else "w", encoding="utf-8", newline="")

    def _writing(self) -> AbstractContextManager[None]:
        if self.path is None:
            return nullcontext()
        way_out = "make room, then start again, with --resume unless there is a --store"
        return os_errors(DataError, f"{self.path} cannot be written", way_out)


class _Lines:
    """A file whose rows end in LF. As the writer's own end of rows, CR in a name is not quoted."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(f"{row[:-2]}\n")


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet by its ending."""
    return path.suffix.lower() in (".parquet", ".pq")


def read_rows(path: Path) -> Iterator[Judged]:
    """The rows of a file that `RowFile` wrote, one after another.

    ConfigError for a Parquet file without pyarrow; DataError if the file cannot be read, has other
    columns, or a malformed row.
    """
    what, way_out = f"{path} cannot be read", "give a file that fusenorm score wrote"
    with os_errors(DataError, what, way_out, UnicodeDecodeError, csv.Error):
        yield from _read_parquet(path) if is_parquet(path) else _read_csv(path)


def _cut_to_whole_rows(path: Path) -> None:
    """Remove a row at the end that was cut short; DataError, and no change, of another file."""
    with path.open("rb+") as file:
        end, at, quotes, first = 0, 0, 0, file.readline()
        if first.rstrip(b"\r\n") != _HEADER and not _HEADER.startswith(first):
            _check_columns(path, ())
        file.seek(0)
        for line in file:
            at, quotes = at + len(line), quotes + line.count(b'"')
            if line.endswith(b"\n") and quotes % 2 == 0:  # not one inside a quoted cell
                end = at
        file.truncate(end)


def _read_csv(path: Path) -> Iterator[Judged]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        names = next(lines, [])
        _check_columns(path, names)
        for cells in lines:
            try:
                yield _row(names, cells)
            except (KeyError, ValueError):
                raise DataError(
                    f"{path}, line {lines.line_num} is not a row of fusenorm score: "
                    f"{','.join(cells)[:80]!r}; score again, or remove the line"
                ) from None


def _write_csv(path: Path, rows: Iterable[Judged]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(_Lines(file)).writerows(chain([Judged._fields], map(_cells, rows)))


def _read_parquet(path: Path) -> Iterator[Judged]:
    parquet = import_parquet()
    from pyarrow import ArrowInvalid

    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        for batch in file.iter_batches(AT_ONCE):
            for row in batch.to_pylist():
                texts = {k: _unescaped(v) for k, v in row.items() if isinstance(v, str)}
                yield Judged(**row | texts)
    except ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}): score again") from None


def _write_parquet(path: Path, rows: Iterator[Judged]) -> None:
    parquet = import_parquet()
    import pyarrow as pa

    kinds = {**dict.fromkeys(NUMBERS, pa.float64()), "ood": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in Judged._fields])
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, AT_ONCE)):
            values = ((_escaped(v) if isinstance(v, str) else v for v in row) for row in group)
            table = [dict(zip(Judged._fields, row, strict=True)) for row in values]
            writer.write_table(pa.Table.from_pylist(table, schema))


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if tuple(names) not in (Judged._fields, Judged._fields[:-1]):  # rows of 0.2.0 have no bound
        raise DataError(
            f"{path} was not written by this version of fusenorm score: its columns must be "
            f"{', '.join(Judged._fields)}"
        )


def _cells(row: Judged) -> list[object]:
    return ["" if v is None else guarded(_escaped(v)) if isinstance(v, str) else v for v in row]


_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(NUMBERS, float),
    "ood": {"True": True, "False": False}.__getitem__,
}


def _row(names: Sequence[str], cells: Sequence[str]) -> Judged:
    named = dict(zip(names, map(_unescaped, cells), strict=True))
    read = {n: _READ.get(n, unguarded)(cell) for n, cell in named.items() if cell or n == "path"}
    return Judged(**read)


_FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20'"  # begin a formula, or a cell that is guarded


def guarded(text: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] and text[0] in _FORMULA else text


def unguarded(text: str) -> str:
    """The text of a cell of `guarded`."""
    return text[1:] if text[:1] == "'" and text[1:2] and text[1] in _FORMULA else text


# What `os.fsdecode` makes of bytes that are not UTF-8; backslashes that could be taken for ours.
_ESCAPED = re.compile(r"[\udc80-\udcff]|\\(?=\\*(?:[\udc80-\udcff]|x[89a-f][0-9a-f]))")
_ESCAPE = re.compile(r"(\\+)x([89a-f][0-9a-f])")


def _escaped(text: str) -> str:
    """A text in valid Unicode, from which `_unescaped` gets it back."""
    escaped = _ESCAPED.sub(
        lambda m: "\\\\" if m[0] == "\\" else f"\\x{ord(m[0]) - 0xDC00:02x}", text
    )
    return escaped.encode("utf-8", "backslashreplace").decode()  # other surrogates name no file


def _unescaped(text: str) -> str:
    def original(match: re.Match[str]) -> str:
        backslashes, byte = match.groups()
        odd = len(backslashes) % 2
        return "\\" * (len(backslashes) // 2) + (chr(0xDC00 + int(byte, 16)) if odd else f"x{byte}")

    return _ESCAPE.sub(original, text)
