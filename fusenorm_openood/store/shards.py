"""Sets of rows that are computed, written and read shard by shard."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.store.encoding import Columns
from fusenorm_openood.store.keys import Key, digest
from fusenorm_openood.store.shardfiles import delete, list_shards, read_shard, write_shard
from fusenorm_openood.urls import Place


class ShardSet:
    """A set of rows under one record, in shards of consecutive rows.

    It is the folder `root/NAME-DIGEST` with `key.json` and one Parquet file per shard. A file gets
    its final name when it is complete, so any number of processes may write shards of the same set.
    If two of them write different bits under one number, the file whose name sorts first is read.

    Args:
        root: the store, a folder or a URL.
        record: what the rows are computed from and how, in values that JSON has. Sets of different
            records share no folder.
        name: a short name for humans, for example of the data set.
        rows: rows of the whole set; 0 = a set without shards.
        shard_rows: rows of each shard but the last.

    Attributes:
        folder: the folder of the set.
        key: the content of `key.json`.
        count: how many shards the complete set has.

    Raises:
        StoreError: the folder is not writable, or has rows of another record, number or shard size.
        TypeError: JSON cannot express the record.
    """

    def __init__(
        self, root: Place, record: Mapping[str, Any], name: str, rows: int, shard_rows: int = 1024
    ) -> None:
        if rows < 0 or shard_rows < 1:
            raise StoreError(f"rows must be >= 0 and shard_rows >= 1, got {rows} and {shard_rows}")
        self.key = Key(record, name, rows, shard_rows)
        self.folder = root / self.key.folder_name
        self.count = -(-rows // shard_rows)
        self._digest = digest(record)
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
        if not 0 <= number < self.count:
            raise StoreError(f"{self.folder.name} has {self.count} shards, and none is {number}")
        start = number * self.key.shard_rows
        return range(start, min(start + self.key.shard_rows, self.key.rows))

    def missing(self) -> list[int]:
        """The numbers of the shards that no file has, from one listing of the folder."""
        present = self.present()
        return [number for number in range(self.count) if number not in present]

    def present(self) -> dict[int, Place]:
        """Number -> the file that is read, from one listing of the folder."""
        files = reversed(list_shards(self.folder))  # of two files of a number, the first one stays
        self._listed = {number: path for number, path in files if number < self.count}
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
        return write_shard(self.folder, number, columns, self._label(number))

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
                if number < self.count:
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

    def discard_damaged(self, number: int) -> None:
        """Delete the files of a shard that are damaged, which one with other bits cannot replace.

        Raises:
            StoreError: a file cannot be deleted.
        """
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
        missing = [number for number in range(self.count) if number not in present]
        if missing:
            rest = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise StoreError(
                f"{len(missing)} of {self.count} shards of {self.folder} are missing "
                f"({', '.join(map(str, missing[:10]))}{rest}): compute them"
            )
        for number in range(self.count):
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
