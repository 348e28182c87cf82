"""Sets of rows on disk, in shards that are written whole and checked when they are read.

A set is a folder `NAME-DIGEST` with `key.json`, which says what its rows were computed from, and
one safetensors file `NUMBER-CHECKSUM.safetensors` per shard.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fusenorm_openood.errors import DamagedShardError, StoreError, os_errors
from fusenorm_openood.storage.files import metadata, write_bytes_whole
from fusenorm_openood.storage.urls import Place

Columns = dict[str, NDArray[Any]]

FORMAT = "fusenorm shards 1"
KEY = "key.json"
DIGITS = 20  # of a record's digest
OTHER = "choose another store"
NUMBERS = (np.float32, np.float64, np.int64, np.bool_)
_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})-([0-9a-f]{16})\.(safetensors|parquet)")


def digest(record: Mapping[str, Any]) -> str:
    """The first `DIGITS` hex digits of the SHA-256 of a record as canonical JSON.

    Tuples are lists, and 1 and 1.0 differ. TypeError for what JSON does not have: NaN, arrays, keys
    that are not strings.
    """
    text = json.dumps(_plain(record), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:DIGITS]


def _plain(value: Any) -> Any:
    """The same value made of the types that JSON has."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:  # JSON makes 1 of it "1"
            raise TypeError(f"key {wrong[0]!r} of a record is no string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"JSON has no {value}: change the record")
    return value


@dataclass(frozen=True)
class Key:
    """What a set of rows is computed from: the content of its `key.json`."""

    record: Mapping[str, Any]  # what the rows are computed from and how, in values that JSON has
    name: str  # for humans; no part of the digest
    rows: int  # of the whole set; 0 = a set without shards
    shard_rows: int = 1024  # rows of each shard but the last

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def folder_name(self) -> str:
        safe = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name)[:60]
        return f"{safe}-{digest(self.record)}"

    @staticmethod
    def read(folder: Place) -> "Key":
        """The key of a folder; FileNotFoundError without one, StoreError if it is unreadable."""
        path = folder / KEY
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise StoreError(f"{path} is not of format {FORMAT!r}: use another store")
            values = [content[field.name] for field in fields(Key)]
            if [type(v) for v in values] != [dict, str, int, int]:
                raise TypeError
            if values[2] < 0 or values[3] < 1:
                raise TypeError
            return Key(*values)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}): {OTHER}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise StoreError(f"{path} is damaged: delete its folder") from None


class ShardSet:
    """A set of rows under one key, in shards of consecutive rows, in a folder of a store.

    A file gets its final name when it is complete, so that any number of processes may write shards
    of the same set. If two of them write different bits under one number, the file whose name sorts
    first is read. Parquet shards of version 0.2.0 are as if they were not there. StoreError if the
    folder, which is created, is not writable, or has rows of another record, number or shard size;
    TypeError if JSON cannot express the record.
    """

    def __init__(self, root: Place, key: Key) -> None:
        self.key = key
        self.folder = root / key.folder_name
        self._digest = digest(key.record)
        self._listed: dict[int, Place] = {}  # by the last listing
        try:
            found = Key.read(self.folder)
        except FileNotFoundError:
            created = datetime.now(timezone.utc).isoformat(timespec="seconds")
            content = _plain({"format": FORMAT, "created": created, **vars(key)})
            with os_errors(StoreError, f"folder {self.folder} is not writable", OTHER):
                write_bytes_whole(self.folder / KEY, f"{json.dumps(content, indent=2)}\n".encode())
            found = Key.read(self.folder)  # another process may have written one at the same time
        if digest(found.record) != self._digest:
            raise StoreError(f"{self.folder} has rows of another record: delete it")
        if (found.rows, found.shard_rows) != (key.rows, key.shard_rows):
            raise StoreError(
                f"{self.folder} has {found.rows} rows in shards of {found.shard_rows}, not "
                f"{key.rows} in shards of {key.shard_rows}: use these, or another store"
            )

    def span(self, number: int) -> range:
        """The rows of a shard; StoreError if the set has no shard of this number."""
        count = self.key.shard_count
        if not 0 <= number < count:
            raise StoreError(f"{self.folder.name} has {count} shards, and none is {number}")
        start = number * self.key.shard_rows
        return range(start, min(start + self.key.shard_rows, self.key.rows))

    def present(self) -> dict[int, Place]:
        """Number -> the file that is read, from one listing of the folder."""
        self._listed = dict(reversed(self._files()))  # of two files of a number, the first one
        return self._listed

    def missing(self) -> list[int]:
        """The numbers of the shards that no file has, from one listing of the folder."""
        return sorted({*range(self.key.shard_count)} - self.present().keys())

    def write(self, number: int, columns: Mapping[str, NDArray[Any]]) -> Place:
        """Write a shard under its final name, all of it or nothing; damaged files of it go.

        Columns are float32, float64, int64 or bool `[N]` or `[N, D]`, or str (of dtype object)
        `[N]`, with N = `len(span(number))`. The bytes depend on the record, the number and the
        columns only. StoreError for other arrays, a full disk, or a folder that is not writable.
        """
        rows = len(self.span(number))
        data = encode(columns, self._label(number), rows)
        path = self.folder / f"{number:06d}-{_checksum(data)}.safetensors"
        what = f"shard {number} cannot be written to {self.folder}"
        with os_errors(StoreError, what, "free disk space, or choose another store"):
            write_bytes_whole(path, data)
        if number in self._listed:  # damaged, and deleted only now: others would find it missing
            for other, fault in self.verify(number):
                if fault:
                    delete(other)
        return path

    def read(self, number: int) -> Columns:
        """The columns of a shard, after a check of all its bytes; the arrays own their memory.

        DamagedShardError if its file is damaged, StoreError if no file has this shard.
        """
        label = self._label(number)
        if number in self._listed:  # a listing for each shard would be quadratic
            with suppress(StoreError):
                return _read(self._listed[number], label)
        if number not in self.present():
            raise StoreError(f"shard {number} of {self.folder} is missing: compute it")
        return _read(self._listed[number], label)

    def verify(self, number: int | None = None) -> Iterator[tuple[Place, DamagedShardError | None]]:
        """Every file of a shard, or of all, also those that `read` passes over, and its fault."""
        for found, path in self._files():
            if number in (None, found):
                try:
                    _read(path, self._label(found))
                    yield path, None
                except DamagedShardError as error:
                    yield path, error
                except StoreError:
                    continue  # another process has deleted it

    def _files(self) -> list[tuple[int, Place]]:
        """Number and path of all shard files, sorted."""
        with os_errors(StoreError, f"folder {self.folder} cannot be read", OTHER):
            names = sorted(path.name for path in self.folder.iterdir())
        files = [(shard_number(n), self.folder / n) for n in names if n.endswith(".safetensors")]
        return [(number, path) for number, path in files if 0 <= number < self.key.shard_count]

    def _label(self, number: int) -> str:
        """What a shard's file says about itself, so that it cannot pass for another shard."""
        span = self.span(number)
        return json.dumps({"set": self._digest, "rows": [span.start, span.stop]})


def shard_number(name: str) -> int:
    """The number in the name of a shard's file, or -1 for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else -1


def encode(columns: Mapping[str, NDArray[Any]], label: str, rows: int) -> bytes:
    """A safetensors file; the same columns in any order give the same bytes.

    Strings are one JSON list in bytes, of dtype uint8, which no other column has. StoreError for an
    array of another kind or number of rows, or none.
    """
    arrays = {}
    for name, values in columns.items():
        shape = list(values.shape)
        if shape[:1] != [rows] or values.ndim > 2:
            raise StoreError(f"column {name!r} is {shape}, not of {rows} rows")
        if values.dtype in NUMBERS:
            arrays[name] = np.ascontiguousarray(values)
        elif values.dtype == object and all(isinstance(value, str) for value in values):
            arrays[name] = np.frombuffer(json.dumps(values.tolist()).encode(), np.uint8)
        else:
            raise StoreError(
                f"column {name!r} is {values.dtype} {shape}, not float32, float64, int64, bool or "
                "str"
            )
    if not arrays:
        raise StoreError("a shard must have columns, got none")
    return save(arrays, {"fusenorm": label})


def decode(data: bytes) -> tuple[str, Columns]:
    """Label and columns of the bytes that `encode` returned; DamagedShardError for other bytes."""
    try:
        label = metadata(data)
        columns = {name: np.array(values) for name, values in load(data).items()}
        for name, values in columns.items():
            if values.dtype == np.uint8:
                texts = json.loads(values.tobytes())
                columns[name] = np.array([*texts, None], dtype=object)[:-1]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedShardError(f"not a shard ({type(error).__name__})") from None
    return label, columns


def _read(path: Place, label: str) -> Columns:
    """The columns of a shard's file."""
    try:
        data = path.read_bytes()
        if not path.name.endswith(f"-{_checksum(data)}.safetensors"):
            raise DamagedShardError("its checksum is another")
        found, columns = decode(data)
        if found != label:
            raise DamagedShardError(f"it says {found}, not {label}")
        return columns
    except FileNotFoundError:
        raise StoreError(f"{path} no longer exists: compute it again") from None
    except OSError as error:
        raise DamagedShardError(f"{path} cannot be read ({error.strerror}): delete it") from None
    except DamagedShardError as error:
        raise DamagedShardError(f"{path} is damaged ({error}): delete it") from None


def delete(path: Place) -> None:
    """Delete a file, which another process may have deleted; StoreError if it cannot be."""
    with os_errors(StoreError, f"{path} cannot be deleted", "check who may write there"):
        path.unlink(missing_ok=True)


def _checksum(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]
