"""Image files on a command line: folders, patterns, image lists, standard input."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from fusenorm_openood.data.folders import Walk, is_image_name
from fusenorm_openood.data.manifest import is_list, listed_in
from fusenorm_openood.errors import DataError
from fusenorm_openood.urls import Place, Places, Url, is_pattern, place


def image_paths(given: Iterable[str]) -> Places:
    """The image files that command-line arguments name, in order, each once.

    A folder, local or at a URL, stands for all image files in it and in its folders, a pattern such
    as `*.png` for the files that it matches, a list (see `is_list`) for the paths in it, relative
    to its folder and perhaps with labels, and `-` for the lines of standard input. A warning says
    what was left out of folders.

    Raises:
        DataError: an argument that names nothing, or a folder that cannot be read.
    """
    walk = Walk()
    found = Places(path for argument in given for path in _paths(argument, walk))
    if said := walk.said():
        warnings.warn(
            f"left out: {said}; convert what is to be read, or name it by a pattern or a list",
            UserWarning,
            stacklevel=2,
        )
    return found


def _paths(argument: str, walk: Walk) -> Iterator[Place]:
    if argument == "-":
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # any name that a system can have
        yield from (place(line.strip()) for line in sys.stdin if line.strip())
        return
    path, before = place(argument), walk.repeats
    try:
        if is_pattern(path):
            found, lacks = walk.matched(path), f"pattern {argument} matches no file: check it"
        elif is_list(path) and (isinstance(path, Url) or path.is_file()):
            found, lacks = list(listed_in(path)), f"list {argument} is empty"
        elif isinstance(path, Url) or path.is_dir():
            found = _inside(path, walk)
            lacks = f"folder {argument} has no image files: give one that has"
            lacks += f"; left out: {said}" if (said := walk.said()) else ""
        elif path.is_file():
            found = [path]
        else:
            raise DataError(f"{argument} is no file, folder or pattern: check the path")
    except OSError as error:
        raise DataError(f"{argument} cannot be read ({error.strerror})") from None
    if not found and walk.repeats == before:
        raise DataError(lacks)
    yield from found


def _inside(path: Place, walk: Walk) -> list[Place]:
    """The images in a folder; any other URL is taken for a file, whose row says more."""
    if isinstance(path, Path):
        return walk.images(path)
    if is_image_name(path.name) or path.text.startswith("http") or "::" in path.text:
        return [path]
    with suppress(OSError):
        return walk.images(path) or [path]
    return [path]
