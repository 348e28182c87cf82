"""Image files on a command line: folders, patterns, image lists, standard input."""

import sys
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path

from PIL import Image

from fusenorm_openood.data.manifest import listed_in
from fusenorm_openood.errors import DataError
from fusenorm_openood.urls import Place, Places, place


def image_paths(given: Iterable[str]) -> Places:
    """The image files that command-line arguments name, in order, each once.

    A folder stands for all image files in it and in its folders, a pattern such as `*.png` for the
    files that it matches, a `.txt` file for the paths in it, relative to its folder and perhaps
    with labels, and `-` for the lines of standard input.

    Raises:
        DataError: an argument that names nothing.
    """
    return Places(path for argument in given for path in _paths(argument))


def _paths(argument: str) -> Iterator[Place]:
    path = Path(argument)
    if "://" in argument:
        yield place(argument)
    elif argument == "-":
        yield from (place(line.strip()) for line in sys.stdin if line.strip())
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and is_image_name(p))
        if not found:
            raise DataError(f"folder {argument} has no image files: give one that has")
        yield from found
    elif path.is_file() and path.suffix.lower() == ".txt":
        yield from listed_in(path)
    elif path.is_file():
        yield path
    elif has_magic(argument):
        matched = sorted(glob(argument, recursive=True))
        if not matched:
            raise DataError(f"pattern {argument} matches no file: check it")
        yield from (Path(p) for p in matched if Path(p).is_file())
    else:
        raise DataError(f"{argument} is no file, folder or pattern: check the path")


def is_image_name(path: Path) -> bool:
    """Whether a file's name has the ending of an image format that PIL can read."""
    formats = Image.registered_extensions()
    return formats.get(path.suffix.lower()) in Image.OPEN
