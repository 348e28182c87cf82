"""What a set of shards was computed from: the record whose digest names its folder."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from fusenorm_openood.errors import StoreError
from fusenorm_openood.storage.files import write_bytes_whole
from fusenorm_openood.storage.urls import Place

FORMAT = "fusenorm shards 1"
KEY = "key.json"
DIGITS = 20  # of a digest


def digest(record: Mapping[str, Any]) -> str:
    """The first `DIGITS` hex digits of the SHA-256 of a record as canonical JSON.

    Keys are sorted, tuples are lists, and floats have the digits of their `repr`: 1 and 1.0 differ.

    Raises:
        TypeError: JSON has no such value (NaN, bytes, sets, arrays, keys that are not strings).
    """
    text = json.dumps(_plain(record), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:DIGITS]


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        hashed = sha256()
        while block := file.read(2**20):
            hashed.update(block)
    return hashed.hexdigest()


@dataclass(frozen=True)
class Key:
    """The content of a set's `key.json`.

    Attributes:
        record: what the rows were computed from and how, in values that JSON has.
        name: a short name for humans; no part of the digest.
        rows: rows of the whole set; 0 = a set without shards.
        shard_rows: rows of each shard but the last.
    """

    record: Mapping[str, Any]
    name: str
    rows: int
    shard_rows: int = 1024

    def __post_init__(self) -> None:
        if self.rows < 0 or self.shard_rows < 1:
            found = f"{self.rows} and {self.shard_rows}"
            raise StoreError(f"rows must be >= 0 and shard_rows >= 1, got {found}")

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def folder_name(self) -> str:
        safe = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name)[:60]
        return f"{safe}-{digest(self.record)}"

    def write(self, folder: Place) -> None:
        """Write the key and the present time.

        Raises:
            StoreError: the folder is not writable.
        """
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {"format": FORMAT, "created": created, **vars(self)}
        text = json.dumps(_plain(content), indent=2) + "\n"
        try:
            write_bytes_whole(folder / KEY, text.encode())
        except OSError as error:
            raise StoreError(
                f"folder {folder} is not writable ({error.strerror}): choose another store"
            ) from None

    @staticmethod
    def read(folder: Place) -> "Key":
        """Read the key of a folder.

        Raises:
            FileNotFoundError: the folder has no key.
            StoreError: the key is unreadable, or of another format.
        """
        path = folder / KEY
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise StoreError(f"{path} is not of format {FORMAT!r}: use another store")
            values = [content[field.name] for field in fields(Key)]
            if [type(value) for value in values] != [dict, str, int, int]:
                raise TypeError
            key = Key(*values)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}): choose another store"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise StoreError(f"{path} is damaged: delete its folder") from None
        return key

    def check(self, folder: Place) -> None:
        """Compare this key with that of a folder.

        Raises:
            FileNotFoundError: the folder has no key.
            StoreError: it has another key.
        """
        found = Key.read(folder)
        if digest(found.record) != digest(self.record):
            raise StoreError(f"{folder} has rows of another record: delete it")
        if (found.rows, found.shard_rows) != (self.rows, self.shard_rows):
            raise StoreError(
                f"{folder} has {found.rows} rows in shards of {found.shard_rows}, not "
                f"{self.rows} in shards of {self.shard_rows}: use these, or another store"
            )


def keys_like(root: Path, key: Key, but: str) -> Iterator[Key]:
    """The keys of a store that equal a key but for one entry of the record."""

    def rest(of: Key) -> str:
        return digest({**vars(of), "record": {**of.record, but: None}})

    prefix = key.folder_name[:-DIGITS]
    for folder in sorted(root.glob(f"{prefix}{'[0-9a-f]' * DIGITS}")):
        try:
            found = Key.read(folder)
        except (FileNotFoundError, StoreError):
            continue
        if but in found.record and rest(found) == rest(key):
            yield found


def _plain(value: Any) -> Any:
    """The same value made of the types that JSON has."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} of a record is no string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(f"JSON has no {type(value).__name__} such as {value!r}: change the record")
