"""Write files completely or not at all, lock them, and tell whether they have changed."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from fusenorm_openood.errors import ConfigError, UnwritableError, import_extra, os_errors
from fusenorm_openood.storage.urls import Place, Url, versions

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    hashed = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            hashed.update(block)
    return hashed.hexdigest()


def manifest(places: Iterable[Place | str], names: Iterable[str] | None = None) -> str:
    """SHA-256, in hex, of the names of files, or other names, and of the files' versions."""
    hashed = sha256()
    for name, version in zip(names or map(str, places), versions(places), strict=True):
        hashed.update(f"{name} {version}".rstrip().encode("utf-8", "surrogatepass") + b"\n")
    return hashed.hexdigest()


def metadata(data: bytes) -> Any:
    """The entry `fusenorm` of a safetensors file's metadata.

    ValueError, KeyError or TypeError for other bytes.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header["__metadata__"]["fusenorm"]


def import_parquet() -> Any:
    """The module `pyarrow.parquet`, which takes long to import; ConfigError without pyarrow."""
    return import_extra("pyarrow.parquet", "a Parquet file", "parquet")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Create a file with `write` under a temporary name, flush it to disk and rename it to `path`.

    Any number of threads, processes and hosts may write the same `path` at once: the last one wins.
    UnwritableError if the disk is full, or the folder is not writable.
    """
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        with unfinished.open("r+b") as file:  # after a power failure: the old file or the new one
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UnwritableError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_bytes_whole(path: Place, data: bytes) -> None:
    """Create a file with these bytes, as `write_whole` does; an object store does so by itself."""
    if isinstance(path, Url):
        path.write_bytes(data)
    else:
        write_whole(path, lambda file: file.write_bytes(data))


# What suffixes say of a file.
KINDS = (
    r"\.(csv|html?|json|onnx|parquet|pdf|pth?|ckpt|safetensors|tsv|xlsx|ya?ml|zip|png|jpe?g|svg)"
)


def check_file(path: Path, option: str, *suffixes: str) -> None:
    """Raise ConfigError unless a file can be written, and its suffix says no kind but these."""
    if path.is_dir() or not path.name:
        raise ConfigError(f"{option} must be a file, got {str(path)!r}: add its name")
    suffix = path.suffix.lower()
    if re.fullmatch(KINDS, suffix) and suffix not in suffixes:
        raise ConfigError(f"{option} writes a {suffixes[0]} file, got {path}: choose that suffix")
    if not path.exists() or path.is_file():  # not /dev/stdout
        check_writable(path.absolute().parent, option)


def check_writable(folder: Path, option: str) -> None:
    """Raise ConfigError unless a folder is writable; a missing one is created, with a message."""
    if not folder.exists():
        log.info(f"results go to {folder}, a new folder")
    what, way_out = f"folder {folder} is not writable", f"choose another with {option}"
    with os_errors(ConfigError, what, way_out):
        write_whole(folder / ".writable", Path.touch)
        (folder / ".writable").unlink(missing_ok=True)  # several processes may check at once


_locks = set[int]()


def lock(path: Path, wait: bool = False) -> int | None:
    """Lock a folder, or a file that is created, until `unlock` or the end of the process.

    Returns what `unlock` takes; None where the system or the file has no locks. Where it is locked
    already, this waits, or raises BlockingIOError; OSError if it cannot be opened.
    """
    if sys.platform == "win32" or (path.exists() and not (path.is_file() or path.is_dir())):
        return None
    opened = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), 0o666)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(opened)
        if isinstance(error, BlockingIOError):
            raise
        return None
    _locks.add(opened)
    return opened


def unlock(locked: int | None) -> None:
    """Undo `lock`."""
    if locked in _locks:
        _locks.remove(locked)
        os.close(locked)


if sys.platform != "win32":  # a loader process that outlives its parent must not keep a lock
    os.register_at_fork(after_in_child=lambda: [*map(unlock, set(_locks))])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Context that processes of one machine enter one after another, if their system has locks.

    The lock is the folder's own, which is created; whatever ends a process releases it.
    """
    locked = None
    with suppress(OSError):  # a folder or a file system that does not allow it
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock(folder, wait=True)
    try:
        yield
    finally:
        unlock(locked)
