"""One walk over folders: links once, hidden names not at all, and a word on what is left out."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePath

from PIL import Image

from fusenorm_openood.errors import DataError
from fusenorm_openood.urls import Place, Url

# Names that network storage and operating systems use for copies of their own, in lower case.
_SYSTEM = {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin"}
_SYSTEM |= {"__macosx", "lost+found", "system volume information", "thumbs.db"}


class Walk:
    """Image files of folders and files of patterns, each once by its real path.

    Links are followed, but for those that lead back. Hidden names are passed over.

    Attributes:
        left_out: number of files that are no images by their names, of hidden images and folders,
            and of broken links, by kind and folder.
        repeats: number of files that were found before.
    """

    def __init__(self) -> None:
        self.left_out = Counter[tuple[str, str]]()
        self.repeats = 0
        self._seen = set[str]()

    def images(self, folder: Place) -> list[Place]:
        """The image files in a folder and in its folders, sorted; of a URL that is a file, this.

        Raises:
            DataError: a folder that cannot be read.
        """
        if isinstance(folder, Path):
            return sorted(list[Place](self._files(folder, [])))
        found = list[Place](folder.find())
        if found == [folder]:
            return found
        shown = self._shown(found, folder)
        return [url for url in shown if self._is_image(url.name, str(url.parent))]

    def matched(self, pattern: Place) -> list[Place]:
        """The files that match a pattern, and the images in folders that do, sorted.

        Parts of the pattern that exist as they are, with brackets for example, are no patterns.

        Raises:
            DataError: a folder that cannot be read.
        """
        if isinstance(pattern, Url):
            return self._shown(pattern.glob(), pattern)
        top, parts = Path(), list(pattern.parts)
        while parts and (top / parts[0]).exists():
            top /= parts.pop(0)
        return sorted(list[Place](self._files(top, parts)), key=str) if top.is_dir() else []

    def said(self) -> str:
        """What was left out, by kind and folder; empty if nothing was."""
        kinds, folders = Counter[str](), Counter[str]()
        for (kind, folder), count in self.left_out.items():
            kinds[kind] += count
            folders[folder] += count
        if not kinds:
            return ""
        counted = _first(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"{counted} (in {_first(f'{name}: {n}' for name, n in folders.most_common())})"

    def _files(self, top: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Files below a folder that match parts of a pattern; the images in folders that do."""
        walked, deep = set[tuple[str, int]](), "**" in parts
        folders: list[tuple[str, tuple[str, ...]]] = [(str(top), ())]
        links = list[tuple[str, tuple[str, ...]]]()
        while folders or links:  # links last, so that a folder keeps its own name
            folder, names = folders.pop() if folders else links.pop()
            real = os.path.realpath(folder)
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
                    if not (back and (deep or len(inner) >= len(parts))):
                        (links if linked else folders).append((entry.path, inner))
                elif linked and not os.path.isfile(entry.path):
                    self.left_out["broken link", folder] += 1
                elif (linked or entry.is_file()) and (
                    _fits(inner, parts)
                    or (not deep and len(inner) > len(parts) and self._is_image(entry.name, folder))
                ):
                    file = os.path.realpath(entry.path) if linked else f"{real}/{entry.name}"
                    if file not in self._seen:
                        yield Path(entry.path)
                    self.repeats += file in self._seen
                    self._seen.add(file)

    def _shown(self, found: Iterable[Place], given: Url) -> list[Place]:
        """The files without those whose names, besides the given ones, are hidden."""
        typed = set(given.text.split("/"))
        return [url for url in found if not any(map(is_hidden, {*str(url).split("/")} - typed))]

    def _is_image(self, name: str, folder: str) -> bool:
        if is_image_name(name):
            return True
        self.left_out[PurePath(name).suffix.lower() or "without ending", folder] += 1
        return False


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, or is one that systems keep for themselves."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image_name(name: str) -> bool:
    """Whether a file's name has the ending of an image format that PIL can read."""
    return Image.registered_extensions().get(PurePath(name).suffix.lower()) in Image.OPEN


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise DataError(
            f"folder {folder} cannot be read ({error.strerror}): let this user read it, or name "
            "the folders to read"
        ) from None


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
    (*texts,) = texts
    more = [f"{len(texts) - most} more"] if len(texts) > most else []
    return ", ".join([*texts[:most], *more])
