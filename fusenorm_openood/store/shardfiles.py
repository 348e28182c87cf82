"""The file of one shard: its name has the shard's number and a checksum of its bytes."""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from numpy.typing import NDArray

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.files import write_bytes_whole
from fusenorm_openood.store.encoding import Columns, decode, encode
from fusenorm_openood.urls import Place

_NAME = re.compile(r"([0-9]{6,})-([0-9a-f]{16})\.parquet")


def list_shards(folder: Place) -> list[tuple[int, Place]]:
    """Number and path of all shard files of a folder, sorted.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise StoreError(f"folder {folder} cannot be read ({error.strerror})") from None
    return [
        (shard_number(name), folder / name) for name in sorted(names) if shard_number(name) >= 0
    ]


def shard_number(name: str) -> int:
    """The number in the name of a shard's file, or -1 for any other name."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] != f"{int(match[1]):06d}":
        return -1
    return int(match[1])


def write_shard(
    folder: Place, number: int, columns: Mapping[str, NDArray[Any]], label: str
) -> Place:
    """Write a shard under a temporary name, flush it to disk and rename it.

    Raises:
        StoreError: columns that cannot be stored, a full disk, or a folder that is not writable.
    """
    data = encode(columns, label)
    path = folder / f"{number:06d}-{_checksum(data)}.parquet"
    try:
        write_bytes_whole(path, data)
    except OSError as error:
        raise StoreError(
            f"shard {number} cannot be written to {folder} ({error.strerror}): "
            "free disk space, or choose another store"
        ) from None
    return path


def read_shard(path: Place, label: str, names: Sequence[str] | None = None) -> Columns:
    """Columns of a shard, after a check of all its bytes; None = all columns.

    Raises:
        DamagedShardError: the file is damaged, unreadable, or has another label.
        StoreError: the file no longer exists, or has no column of such a name.
    """
    try:
        data = path.read_bytes()
        if _checksum(data) != path.name[-24:-8]:
            raise DamagedShardError("its checksum is another")
        found, columns = decode(data, names)
        if found != label:
            raise DamagedShardError(f"it says {found}, not {label}")
    except FileNotFoundError:
        raise StoreError(f"{path} no longer exists: compute it again") from None
    except OSError as error:
        raise DamagedShardError(f"{path} cannot be read ({error.strerror}): delete it") from None
    except DamagedShardError as error:
        raise DamagedShardError(f"{path} is damaged ({error}): delete it") from None
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    return columns


def delete(path: Place) -> None:
    """Delete a file, which another process may have deleted.

    Raises:
        StoreError: it cannot be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path} cannot be deleted ({error.strerror})") from None


def _checksum(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]
