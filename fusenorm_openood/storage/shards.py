"""Sets of rows on disk, in shards that are written whole and checked when they are read."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.storage.files import write_bytes_whole
from fusenorm_openood.storage.keys import Key, digest
from fusenorm_openood.storage.urls import Place

Columns = dict[str, NDArray[Any]]

_LABEL = b"fusenorm"
_NUMBERS = (np.float32, np.float64, np.int64, np.bool_)


def encode(columns: Mapping[str, NDArray[Any]], label: str) -> bytes:
    """A Parquet file of one row group; the same columns in any order give the same bytes.

    Args:
        columns: name -> float32, float64, int64, bool or str (dtype object) [N], or float32 or
            float64 [N, D].
        label: kept in the file; `decode` returns it.

    Raises:
        StoreError: an array of another kind.
    """
    import pyarrow as pa  # takes longer to import than the rest of the package
    from pyarrow import parquet

    arrays = {name: _to_arrow(name, columns[name]) for name in sorted(columns)}
    table = pa.table(arrays).replace_schema_metadata({_LABEL: label.encode()})
    sink = pa.BufferOutputStream()
    parquet.write_table(
        table,
        sink,
        row_group_size=len(table),
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode(data: bytes, names: Sequence[str] | None = None) -> tuple[str, Columns]:
    """The label and the columns of a file of `encode`; the arrays own their memory.

    Args:
        names: the columns to decode; None = all.

    Raises:
        DamagedShardError: these bytes are no such file.
        StoreError: the file has no column of such a name.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        label = file.schema_arrow.metadata[_LABEL].decode()
        found = file.schema_arrow.names
        wanted = [name for name in (found if names is None else names) if name in found]
        table = file.read(columns=wanted, use_threads=False)
        columns = {name: _to_numpy(table.column(name)) for name in wanted}
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedShardError(f"not a shard ({type(error).__name__})") from None
    if names is not None and (unknown := set(names) - set(found)):
        raise StoreError(f"no column {min(unknown)!r}: choose from {', '.join(found)}")
    return label, columns


def _to_arrow(name: str, values: NDArray[Any]) -> Any:
    import pyarrow as pa

    try:
        if values.ndim == 1 and values.dtype in _NUMBERS:
            return pa.array(values)
        if values.ndim == 1 and values.dtype == object and all(isinstance(v, str) for v in values):
            return pa.array(values, pa.string())
        if values.ndim == 2 and values.dtype in (np.float32, np.float64) and values.shape[1]:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    except UnicodeError:
        raise StoreError(f"column {name!r} has a string that is not valid Unicode") from None
    raise StoreError(
        f"column {name!r} is {values.dtype} {list(values.shape)}, not float32, float64, int64, "
        "bool or str of one dimension, or float32 or float64 of two"
    )


def _to_numpy(column: Any) -> NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return flat.reshape(-1, column.type.list_size)
    return np.array(column.to_numpy())


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


class ShardSet:
    """A set of rows under one record, in shards of consecutive rows.

    It is the folder `root/NAME-DIGEST` with `key.json` and one Parquet file per shard. A file gets
    its final name when it is complete, so any number of processes may write shards of the same set.
    If two of them write different bits under one number, the file whose name sorts first is read.

    Args:
        root: the store, a folder or a URL.
        key: what the rows are computed from. Sets of different records share no folder.

    Attributes:
        folder: the folder of the set.

    Raises:
        StoreError: the folder is not writable, or has rows of another record, number or shard size.
        TypeError: JSON cannot express the record.
    """

    def __init__(self, root: Place, key: Key) -> None:
        self.key = key
        self.folder = root / key.folder_name
        self._digest = digest(key.record)
        self._listed: dict[int, Place] = {}  # by the last listing
        try:
            self.key.check(self.folder)
        except FileNotFoundError:
            self.key.write(self.folder)
            self.key.check(self.folder)  # another process may have written one at the same time

    def span(self, number: int) -> range:
        """The rows of a shard.

        Raises:
            StoreError: the set has no shard of this number.
        """
        if not 0 <= number < self.key.shard_count:
            raise StoreError(
                f"{self.folder.name} has {self.key.shard_count} shards, and none is {number}"
            )
        start = number * self.key.shard_rows
        return range(start, min(start + self.key.shard_rows, self.key.rows))

    def missing(self) -> list[int]:
        """The numbers of the shards that no file has, from one listing of the folder."""
        present = self.present()
        return [number for number in range(self.key.shard_count) if number not in present]

    def present(self) -> dict[int, Place]:
        """Number -> the file that is read, from one listing of the folder."""
        files = reversed(list_shards(self.folder))  # of two files of a number, the first one stays
        self._listed = {number: path for number, path in files if number < self.key.shard_count}
        return self._listed

    def write(self, number: int, columns: Mapping[str, NDArray[Any]]) -> Place:
        """Write a shard: a file with all rows under its final name, or none.

        The bytes depend on the record, the number, the columns and the release of pyarrow only.

        Args:
            number: from 0 to `count - 1`.
            columns: name -> float32, float64, int64, bool or str (dtype object) [N], or float32 or
                float64 [N, D], with N = `len(span(number))`.

        Raises:
            StoreError: other arrays, a full disk, or a folder that is not writable.
        """
        rows = len(self.span(number))
        if not columns:
            raise StoreError(f"shard {number} of {self.folder.name} has no columns")
        for name, values in columns.items():
            if values.shape[:1] != (rows,):
                raise StoreError(
                    f"column {name!r} of shard {number} is {list(values.shape)}, not of {rows} rows"
                )
        path = write_shard(self.folder, number, columns, self._label(number))
        if number in self._listed:  # damaged, and not to be deleted before: others would miss it
            self._delete_damaged(number)
        return path

    def read(self, number: int, columns: Sequence[str] | None = None) -> Columns:
        """Columns of a shard, after a check of all its bytes; None = all.

        Raises:
            DamagedShardError: its file is damaged; `discard` the shard and compute it again.
            StoreError: no file has this shard, or it has no such column.
        """
        label = self._label(number)
        if number in self._listed:  # a listing for each shard would be quadratic
            with suppress(StoreError):
                return read_shard(self._listed[number], label, columns)
        path = self.present().get(number)
        if path is None:
            raise StoreError(f"shard {number} of {self.folder} is missing: compute it")
        return read_shard(path, label, columns)

    def verify(self) -> Iterator[tuple[Place, DamagedShardError | None]]:
        """Every file of every shard, also those that `read` passes over, and what is wrong."""
        for number, path in list_shards(self.folder):
            try:
                if number < self.key.shard_count:
                    read_shard(path, self._label(number))
                    yield path, None
            except DamagedShardError as error:
                yield path, error
            except StoreError:
                continue  # another process has deleted it

    def discard(self, number: int) -> None:
        """Delete every file of a shard, so that it is missing.

        Raises:
            StoreError: a file cannot be deleted.
        """
        for found, path in list_shards(self.folder):
            if found == number:
                delete(path)

    def _delete_damaged(self, number: int) -> None:
        """Delete the damaged files of a shard, which one with other bits does not replace."""
        for found, path in list_shards(self.folder):
            if found == number:
                try:
                    read_shard(path, self._label(number))
                except DamagedShardError:
                    delete(path)

    def iterate(self, columns: Sequence[str] | None = None) -> Iterator[Columns]:
        """The shards in order, with the columns asked for, after a check of all bytes.

        Raises:
            DamagedShardError: a shard is damaged.
            StoreError: shards are missing, or have no such column.
        """
        present = self.present()
        missing = [number for number in range(self.key.shard_count) if number not in present]
        if missing:
            rest = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise StoreError(
                f"{len(missing)} of {self.key.shard_count} shards of {self.folder} are missing "
                f"({', '.join(map(str, missing[:10]))}{rest}): compute them"
            )
        for number in range(self.key.shard_count):
            yield read_shard(present[number], self._label(number), columns)

    def load(self, columns: Sequence[str] | None = None) -> Columns:
        """The columns of all rows, [rows] or [rows, D]; a set of zero rows has no columns.

        Raises:
            DamagedShardError: a shard is damaged.
            StoreError: shards are missing, or differ in their columns.
        """
        whole: Columns = {}
        for number, part in enumerate(self.iterate(columns)):
            if number == 0:
                rows = self.key.rows
                whole = {n: np.empty((rows, *v.shape[1:]), v.dtype) for n, v in part.items()}
            if _kinds(part) != _kinds(whole):
                raise StoreError(
                    f"shards 0 and {number} of {self.folder} have different columns: discard one"
                )
            span = self.span(number)
            for name, values in part.items():
                whole[name][span.start : span.stop] = values
        return whole

    def _label(self, number: int) -> str:
        """What a shard's file says about itself, so that it cannot pass for another shard."""
        span = self.span(number)
        return json.dumps({"set": self._digest, "rows": [span.start, span.stop]})


def _kinds(columns: Columns) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    return {name: (values.dtype, values.shape[1:]) for name, values in columns.items()}
