"""Image files in folders, patterns, and lists of many formats, local or at URLs."""

import bz2
import csv
import gzip
import json
import lzma
import os
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path, PurePath

from PIL import Image

from fusenorm_openood.data import images, pixels
from fusenorm_openood.errors import DataError, os_errors
from fusenorm_openood.storage.files import import_parquet
from fusenorm_openood.storage.urls import Place, Places, Url, is_pattern, place

# Names that network storage and operating systems use for copies of their own, in lower case.
_SYSTEM = {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin"}
_SYSTEM |= {"__macosx", "lost+found", "system volume information", "thumbs.db"}


def image_paths(given: Iterable[str]) -> Places:
    """The image files that command-line arguments name, in order, each once.

    A folder, local or at a URL, stands for all image files in it and in its folders, a pattern such
    as `*.png` for the files that it matches, a list (see `manifest_paths`) for the paths in it, and
    `-` for the lines of standard input. A warning names what was left out of folders. DataError for
    an argument that names nothing, or a folder that cannot be read.
    """
    walk = Walk()
    found = Places(path for argument in given for path in _paths(argument, walk))
    if left_out := walk.summary():
        warnings.warn(
            f"left out: {left_out}; convert what is to be read, or name it by a pattern or a list",
            UserWarning,
            stacklevel=2,
        )
    return found


def each_page(paths: Places, pages: str) -> Places:
    """The files, or with `pages` = `all` a place for each of their pages or frames."""
    if pages != "all":
        return paths
    return Places(page for path in paths for page in pixels.pages_of(path))


def _paths(argument: str, walk: "Walk") -> Iterator[Place]:
    if argument == "-":
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # any name that a system can have
        yield from (place(line.strip()) for line in sys.stdin if line.strip())
        return
    path, before = place(argument), walk.repeats
    with os_errors(DataError, f"{argument} cannot be read", "check it"):
        if is_pattern(path):
            found, lacks = walk.matched(path), f"pattern {argument} matches no file: check it"
        elif _kind(path)[0] in _READERS and (isinstance(path, Url) or path.is_file()):
            found, lacks = list(_listed(path)), f"list {argument} is empty"
        elif isinstance(path, Url) or path.is_dir():
            found = walk.images(path)
            lacks = f"folder {argument} has no image files: give one that has"
            lacks += f"; left out: {left_out}" if (left_out := walk.summary()) else ""
        elif path.is_file():
            found = [path]
        else:
            raise DataError(f"{argument} is no file, folder or pattern: check the path")
    if not found and walk.repeats == before:
        raise DataError(lacks)
    yield from found


class Walk:
    """Image files of folders and files of patterns, each once by its real path.

    Links are followed, but for those that lead back. Hidden names are passed over.
    """

    def __init__(self) -> None:
        # By kind and folder: files that are no images by their names, hidden images and folders,
        # and broken links.
        self.left_out = Counter[tuple[str, str]]()
        self.repeats = 0  # files that were found before
        self._found = set[str]()

    def images(self, folder: Place) -> list[Place]:
        """The image files in a folder and in its folders, sorted.

        Any other URL is taken for a file, whose row says more.
        """
        if isinstance(folder, Path):
            return sorted(list[Place](self._files(folder, [])))
        is_file = folder.text.startswith("http") or "::" in folder.text
        with suppress(OSError):
            if not (is_file or is_image_name(folder.name)) and (urls := folder.find()) != [folder]:
                shown = _shown(urls, folder)
                return [u for u in shown if self._is_image(u.name, str(u.parent))] or [folder]
        return [folder]

    def matched(self, pattern: Place) -> list[Place]:
        """The files that match a pattern, and the images in folders that do, sorted.

        Parts of the pattern that exist as they are, with brackets for example, are no patterns.
        """
        if isinstance(pattern, Url):
            return _shown(pattern.glob(), pattern)
        top, parts = Path(), list(pattern.parts)
        while parts and (top / parts[0]).exists():
            top /= parts.pop(0)
        return sorted(list[Place](self._files(top, parts)), key=str) if top.is_dir() else []

    def summary(self) -> str:
        """What was left out, by kind and folder; empty if nothing was."""
        kinds, folders = Counter[str](), Counter[str]()
        for (kind, folder), count in self.left_out.items():
            kinds[kind] += count
            folders[folder] += count
        counted = _first(f"{count} {kind}" for kind, count in kinds.most_common())
        where = _first(f"{folder}: {count}" for folder, count in folders.most_common())
        return f"{counted} (in {where})" if kinds else ""

    def _files(self, top: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Files below a folder that match parts of a pattern; the images in folders that do."""
        walked, deep = set[tuple[str, int]](), "**" in parts
        folders: list[tuple[str, tuple[str, ...]]] = [(str(top), ())]
        links = list[tuple[str, tuple[str, ...]]]()
        while folders or links:  # links last, so that a folder keeps its own name
            folder, names = folders.pop() if folders else links.pop()
            real = os.path.realpath(folder)
            # A folder may be reached at several depths, at which other parts apply to it.
            key = real, 0 if deep else min(len(names), len(parts))
            if key in walked:
                continue
            walked.add(key)
            for entry in _entries(folder):
                inner = (*names, entry.name)
                if not _leads(inner, parts):
                    continue
                linked = entry.is_symlink()
                is_folder = os.path.isdir(entry.path) if linked else entry.is_dir()
                if is_hidden(entry.name) and entry.name not in parts:
                    if is_folder or is_image_name(entry.name):
                        self.left_out["hidden", folder] += 1
                elif is_folder:
                    target = os.path.realpath(entry.path) if linked else ""
                    back = linked and f"{real}/".startswith(f"{target.rstrip('/')}/")
                    # A link back may be part of a pattern, but is no folder to walk through.
                    if not (back and (deep or len(inner) >= len(parts))):
                        (links if linked else folders).append((entry.path, inner))
                elif linked and not os.path.isfile(entry.path):
                    self.left_out["broken link", folder] += 1
                elif (linked or entry.is_file()) and (
                    _fits(inner, parts)
                    or (not deep and len(inner) > len(parts) and self._is_image(entry.name, folder))
                ):
                    file = os.path.realpath(entry.path) if linked else f"{real}/{entry.name}"
                    if file not in self._found:
                        yield Path(entry.path)
                    self.repeats += file in self._found
                    self._found.add(file)

    def _is_image(self, name: str, folder: str) -> bool:
        if not is_image_name(name):
            self.left_out[PurePath(name).suffix.lower() or "without ending", folder] += 1
        return is_image_name(name)


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, or is one that systems keep for themselves."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image_name(name: str) -> bool:
    """Whether a file's name has the ending of an image format that can be read."""
    images.formats()
    suffix = PurePath(name).suffix.lower()
    if suffix in images.OTHERS:
        return find_spec(images.OTHERS[suffix]) is not None
    return Image.EXTENSION.get(suffix) in Image.OPEN


def _shown(found: Iterable[Place], given: Url) -> list[Place]:
    """The files without those whose names, besides the given ones, are hidden."""
    typed = set(given.text.split("/"))
    return [url for url in found if not any(map(is_hidden, {*str(url).split("/")} - typed))]


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    what = f"folder {folder} cannot be read"
    way_out = "let this user read it, or name the folders to read"
    with os_errors(DataError, what, way_out), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)


def _leads(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether what lies below these names can match a pattern, or lies in a folder that does."""
    for name, part in zip(names, parts, strict=False):
        if part == "**":
            return True
        if not fnmatch(name, part):
            return False
    return True


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether names match a pattern part by part; `**` stands for any number of them."""
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _fits(names, parts[1:]) or _fits(names[1:], parts)
    return fnmatch(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _first(texts: Iterable[str], most: int = 5) -> str:
    texts = list(texts)
    more = [f"{len(texts) - most} more"] if len(texts) > most else []
    return ", ".join([*texts[:most], *more])


def manifest_paths(given: str) -> Places:
    """The files that a manifest, or each that a pattern matches, lists, in order, each once.

    Both are paths or URLs. A Parquet, CSV, TSV or JSON Lines file lists files in its column `path`,
    any other one in its lines, perhaps with labels; all may be compressed (.gz, .bz2, .xz).
    Relative paths start at the manifest's folder. DataError for a manifest that is missing, cannot
    be read, or lists nothing; ConfigError for a Parquet file without pyarrow.
    """
    path = place(given)
    with os_errors(DataError, f"pattern {given} cannot be read", "check it"):
        manifests = Walk().matched(path) if is_pattern(path) else [path]
    if not manifests:
        raise DataError(f"pattern {given} matches no file: check it")
    listed = Places(path for manifest in manifests for path in _listed(manifest))
    if not listed:
        raise DataError(f"manifest {given} lists no files: give one that does")
    return listed


def _listed(manifest: Place) -> Iterator[Place]:
    """The files that one manifest lists."""
    ending, unpacked = _kind(manifest)
    if ending in (".json", ".yaml", ".yml", ".xml"):
        raise DataError(
            f"list {manifest} must be text, CSV, TSV, JSON Lines or Parquet: convert it"
        )
    if ending == ".parquet":
        import_parquet()
    try:
        data = manifest.read_bytes()
        try:
            data = unpacked(data) if unpacked else data
        except ValueError as error:  # bz2's for a file that is cut
            raise EOFError(str(error)) from None
        names = _READERS.get(ending, _text_names)(data)
        if not all(isinstance(name, str) for name in names):
            raise TypeError("some are not")
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


def _kind(path: Place) -> tuple[str, Callable[[bytes], bytes] | None]:
    """The ending of a list's name without that of its compression, and what unpacks it."""
    name = PurePath(path.name.lower())
    unpacked = _UNPACKED.get(name.suffix)
    return (PurePath(name.stem).suffix if unpacked else name.suffix), unpacked


def _parquet_names(data: bytes) -> list[str]:
    parquet = import_parquet()
    from pyarrow import ArrowException

    try:
        file = parquet.ParquetFile(BytesIO(data))
        if "path" not in file.schema_arrow.names:
            raise ValueError(f"found: {', '.join(file.schema_arrow.names)}")
        names: list[str] = file.read(["path"]).column("path").to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None
    return names


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
    return [json.loads(line)["path"] for line in _lines(data)]


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
