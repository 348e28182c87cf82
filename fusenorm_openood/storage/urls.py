"""Files and folders that URLs name, with the methods of `pathlib.Path` that this package uses.

Each call finds its file system anew in fsspec's cache: a `Url` pickles, and survives a fork.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, TypeAlias

# Where the usual object stores say which version of an object they have.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, order=True)
class Url:
    """A file or folder of an object store, or of anything else that fsspec can read.

    Methods raise what those of `Path` raise; errors of a file system, of a missing package for it
    and of credentials are OSErrors with the reason in `strerror`.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{_without_slash(self.text)}/{name}")

    @property
    def name(self) -> str:
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "Url":
        return Url(_without_slash(self.text.rstrip("/").rpartition("/")[0] + "/"))

    def read_bytes(self) -> bytes:
        with self._system() as (system, path):
            found: bytes = system.cat_file(path)
            return found

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Replace the object; object stores show all of it or nothing."""
        with self._system() as (system, path):
            system.pipe_file(path, data)

    def iterdir(self) -> Iterator["Url"]:
        """What a folder has now, whatever fsspec has cached."""
        return (self / Url(entry["name"]).name for entry in self._entries())

    def exists(self) -> bool:
        with self._system() as (system, path):
            return bool(system.exists(path))

    def glob(self) -> list["Url"]:
        """The files that match this URL as a pattern, sorted."""
        with self._system() as (system, path):
            found = system.glob(path, detail=True)
            files = sorted(name for name, entry in found.items() if entry["type"] == "file")
            return [Url(system.unstrip_protocol(name)) for name in files]

    def find(self) -> list["Url"]:
        """The files in this folder and in its folders, sorted; this URL alone if it is a file."""
        with self._system() as (system, path):
            names = [str(found).removeprefix(path).lstrip("/") for found in system.find(path)]
        return [self / name if name else self for name in sorted(names)]

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._system() as (system, path):
                system.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _entries(self) -> list[dict[str, Any]]:
        with self._system() as (system, path):
            system.invalidate_cache(path)
            found: list[dict[str, Any]] = system.ls(path, detail=True)
            return found

    @contextmanager
    def _system(self) -> Iterator[tuple[Any, str]]:
        """Context with the file system and this file's path in it."""
        if "reference" in re.split("://|::", self.text):
            raise OSError(errno.EPERM, "its templates could run code", self.text)
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            reason = "URLs need fsspec: pip install 'fusenorm-openood[remote]'"
            raise OSError(errno.ENOSYS, reason, self.text) from None
        try:
            yield url_to_fs(self.text)  # imports the package of the protocol
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", self.text) from None
        except MemoryError:
            raise
        except Exception as error:  # each package has its own errors, of credentials for example
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OSError(errno.EIO, reason, self.text) from error


def _without_slash(url: str) -> str:
    """A URL without slashes at its end but those of its protocol: `memory://`."""
    protocol, mark, path = url.partition("://")
    return f"{protocol}{mark}{path.rstrip('/')}"


Place: TypeAlias = Path | Url


def place(text: str | Place) -> Place:
    """A local path, also one given as `file://`, or a URL."""
    given = str(text)
    if "://" not in given:
        return Path(given)
    local = given.removeprefix("file://")
    return Url(given) if local == given else Path(local)


_PAGE = re.compile(r"(.+)#page=([1-9]\d{0,8})", re.DOTALL)


def split_page(given: Place) -> tuple[Place, int]:
    """A file without the page that its name ends in, and that page, from 1; 0 = none is named.

    >>> split_page(Path("scan.tif#page=2"))[1], split_page(Path("scan.tif"))[1]
    (2, 0)
    """
    found = _PAGE.fullmatch(str(given)) if "#page=" in given.name else None
    if found is None or (isinstance(given, Path) and given.exists()):
        return given, 0
    return place(found[1]), int(found[2])


def is_pattern(given: Place) -> bool:
    """Whether a place has wildcards, and is nothing that exists."""
    if isinstance(given, Url) and given.text.startswith("http"):
        return "*" in given.text  # a question mark begins a query
    return has_magic(str(given)) and not given.exists()


class Places(Sequence[Place]):
    """Files in order, each once. They are stored as texts, which take a quarter of the memory."""

    def __init__(self, places: Iterable[Place | str]) -> None:
        self.texts = list(dict.fromkeys(map(str, places)))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        found = self.texts[index]
        return place(found) if isinstance(found, str) else Places(found)


def versions(places: Iterable[Place | str]) -> Iterator[str]:
    """Size and time of the last change, or the ETag, of each file; empty if it cannot be found.

    The folders of URLs are listed: that is one request per thousand files, not one per file.
    """
    folders: dict[Url, dict[str, str]] = {}
    for given in places:
        one = split_page(place(given))[0] if "#page=" in str(given) else given
        try:
            if not isinstance(one, Url):
                found = os.stat(one)
                yield f"{found.st_size} {found.st_mtime_ns}"
                continue
            folder = one.parent
            if folder not in folders:
                folders[folder] = _listed(folder)
            if version := folders[folder].get(one.name):
                yield version
                continue
            with one._system() as (system, path):
                version = _version_of(system.info(path))
            yield version
        except (OSError, ValueError):  # also for a name that no file can have
            yield ""


def _listed(folder: Url) -> dict[str, str]:
    """Name -> version of the files of a folder; web servers list none."""
    try:
        return {Url(entry["name"]).name: _version_of(entry) for entry in folder._entries()}
    except OSError:
        return {}


def _version_of(info: dict[str, Any]) -> str:
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    return f"{info.get('size')} {version}"
