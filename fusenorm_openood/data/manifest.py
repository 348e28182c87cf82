"""Lists of image files: text, CSV or Parquet, local or at a URL."""

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO, StringIO
from pathlib import PurePath

from fusenorm_openood.data.folders import Walk
from fusenorm_openood.errors import DataError
from fusenorm_openood.urls import Place, Places, is_pattern, place


def manifest_paths(given: str) -> Places:
    """The files that manifests list, in order, each once.

    Args:
        given: a manifest, or a pattern that matches some: a path or a URL. A Parquet, CSV, TSV or
            JSON Lines file lists files in its column `path`, any other one in its lines, perhaps
            with labels; all may be compressed (.gz, .bz2, .xz). Relative paths start at the
            manifest's folder.

    Raises:
        DataError: a manifest that is missing, cannot be read, or lists nothing.
    """
    manifests = _matches(place(given)) if is_pattern(place(given)) else [place(given)]
    listed = Places(path for manifest in manifests for path in listed_in(manifest))
    if not listed:
        raise DataError(f"manifest {given} lists no files: give one that does")
    return listed


def listed_in(manifest: Place) -> Iterator[Place]:
    """The files that one manifest lists; see `manifest_paths`."""
    ending, unpacked = _kind(manifest)
    if ending in (".json", ".yaml", ".yml", ".xml"):
        raise DataError(
            f"list {manifest} must be text, CSV, TSV, JSON Lines or Parquet: convert it"
        )
    try:
        data = manifest.read_bytes()
        try:
            data = unpacked(data) if unpacked else data
        except ValueError as error:  # bz2's for a file that is cut
            raise EOFError(str(error)) from None
        names = _READERS.get(ending, _text_names)(data)
    except OSError as error:
        raise DataError(f"manifest {manifest} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DataError(
            f"list {manifest} must be in UTF-8: convert it, for example with iconv"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"list {manifest} is damaged ({error}): copy it again") from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"manifest {manifest} must have a column 'path' of strings ({error}): add it"
        ) from None
    for name in names:
        yield place(name) if "://" in name else manifest.parent / name


def _matches(pattern: Place) -> list[Place]:
    try:
        matched = Walk().matched(pattern)
    except OSError as error:
        raise DataError(f"pattern {pattern} cannot be read ({error.strerror})") from None
    if not matched:
        raise DataError(f"pattern {pattern} matches no file: check it")
    return matched


def _parquet_names(data: bytes) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(BytesIO(data))
        if "path" not in file.schema_arrow.names:
            raise ValueError(f"found: {', '.join(file.schema_arrow.names)}")
        names = file.read(["path"]).column("path").to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None
    if not all(isinstance(name, str) for name in names):
        raise TypeError("some are not")
    return names  # type: ignore[no-any-return]


def _csv_names(data: bytes, delimiter: str = ",") -> list[str]:
    text = StringIO(data.decode("utf-8-sig"), newline="")
    rows = csv.DictReader(text, delimiter=delimiter)
    if "path" not in (rows.fieldnames or ()):
        raise ValueError(f"found: {', '.join(rows.fieldnames or ())}")
    return [row["path"] for row in rows if row["path"]]


def _text_names(data: bytes) -> list[str]:
    names = []
    for line in _lines(data):
        fields = line.rsplit(maxsplit=1)
        labelled = len(fields) == 2 and fields[1].lstrip("-").isdecimal()
        names.append(fields[0] if labelled else line)
    return names


def _json_names(data: bytes) -> list[str]:
    rows = [json.loads(line) for line in _lines(data)]
    names = [row["path"] for row in rows]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("some are not")
    return names


def _lines(data: bytes) -> Iterator[str]:
    """Lines that are not empty; other separators of Unicode, such as U+2028, do not end one."""
    return filter(None, map(str.strip, StringIO(data.decode("utf-8-sig"), newline=None)))


_READERS: dict[str, Callable[[bytes], list[str]]] = {
    ".txt": _text_names,
    ".csv": _csv_names,
    ".tsv": partial(_csv_names, delimiter="\t"),
    ".jsonl": _json_names,
    ".ndjson": _json_names,
    ".parquet": _parquet_names,
}
_UNPACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def is_list(path: Place) -> bool:
    """Whether a file's name says that it is a list: .txt, .csv, .tsv, .jsonl, .ndjson, .parquet."""
    return _kind(path)[0] in _READERS


def _kind(path: Place) -> tuple[str, Callable[[bytes], bytes] | None]:
    """The ending of a list's name without that of its compression, and what unpacks it."""
    name = PurePath(path.name.lower())
    unpacked = _UNPACKED.get(name.suffix)
    return (PurePath(name.stem).suffix if unpacked else name.suffix), unpacked
