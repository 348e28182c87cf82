"""Lists of image files: text, CSV or Parquet, local or at a URL."""

import csv
from collections.abc import Iterator
from glob import glob, has_magic
from io import BytesIO, StringIO

from fusenorm_openood.errors import DataError
from fusenorm_openood.urls import Place, Places, Url, place


def manifest_paths(given: str) -> Places:
    """The files that manifests list, in order, each once.

    Args:
        given: a manifest, or a pattern that matches some: a path or a URL. A Parquet or CSV file
            lists files in its column `path`, any other one in its lines, perhaps with labels.
            Relative paths start at the manifest's folder.

    Raises:
        DataError: a manifest that is missing, cannot be read, or lists nothing.
    """
    manifests = [place(given)]
    if has_magic(given):
        manifests = _matches(place(given))
    listed = Places(path for manifest in manifests for path in listed_in(manifest))
    if not listed:
        raise DataError(f"manifest {given} lists no files: give one that does")
    return listed


def listed_in(manifest: Place) -> Iterator[Place]:
    """The files that one manifest lists; see `manifest_paths`."""
    kinds = {".parquet": _parquet_names, ".csv": _csv_names}
    try:
        names = kinds.get(manifest.suffix.lower(), _text_names)(manifest.read_bytes())
    except OSError as error:
        raise DataError(f"manifest {manifest} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(
            f"list {manifest} must be in UTF-8: convert it, for example with iconv"
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"manifest {manifest} must have a column 'path' of strings ({error}): add it"
        ) from None
    for name in names:
        yield place(name) if "://" in name else manifest.parent / name


def _matches(pattern: Place) -> list[Place]:
    try:
        found = (
            pattern.glob() if isinstance(pattern, Url) else map(place, sorted(glob(str(pattern))))
        )
    except OSError as error:
        raise DataError(f"pattern {pattern} cannot be read ({error.strerror})") from None
    matched = list[Place](found)
    if not matched:
        raise DataError(f"pattern {pattern} matches no file: check it")
    return matched


def _parquet_names(data: bytes) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_table(BytesIO(data), columns=["path"]).column("path").to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None
    if not all(isinstance(name, str) for name in names):
        raise TypeError("some are not")
    return names  # type: ignore[no-any-return]


def _csv_names(data: bytes) -> list[str]:
    rows = csv.DictReader(StringIO(data.decode("utf-8-sig"), newline=""))
    if "path" not in (rows.fieldnames or ()):
        raise KeyError(f"found: {', '.join(rows.fieldnames or ())}")
    return [row["path"] for row in rows if row["path"]]


def _text_names(data: bytes) -> list[str]:
    names = []
    for line in filter(None, map(str.strip, data.decode("utf-8-sig").splitlines())):
        fields = line.rsplit(maxsplit=1)
        labelled = len(fields) == 2 and fields[1].lstrip("-").isdecimal()
        names.append(fields[0] if labelled else line)
    return names
