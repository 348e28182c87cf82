"""What a store contains, whether it is intact, and what can go."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fusenorm_openood.errors import DamagedShardError, StoreError, os_errors
from fusenorm_openood.storage.shards import KEY, OTHER, Key, ShardSet, delete, shard_number

_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{32}\.tmp")
_DAY = 24 * 60 * 60  # a process takes seconds to write a temporary file


class Entry(NamedTuple):
    """One set of a store."""

    folder: Path
    record: dict[str, Any]  # what its rows were computed from and how
    rows: int
    present: int  # shards that exist, of `shards`
    shards: int
    size: int  # bytes of its files

    @property
    def complete(self) -> bool:
        return self.present == self.shards


class Removal(NamedTuple):
    """A set or a file of it that `prune` removes; `size` in bytes."""

    path: Path
    size: int
    reason: str


def listing(root: Path) -> list[Entry]:
    """The sets of a store, sorted by folder; StoreError if it cannot be read."""
    entries = []
    for folder, shards in _sets(root):
        key, size = shards.key, sum(map(_size, _own_files(folder)))
        count = len(shards.present()), key.shard_count
        entries.append(Entry(folder, dict(key.record), key.rows, *count, size))
    return entries


def verify(root: Path) -> dict[Path, DamagedShardError | None]:
    """Every shard of a store, all of whose bytes are read, and its fault; StoreError as above."""
    found = ((folder, one) for folder, shards in _sets(root) for one in shards.verify())
    return {folder / path.name: fault for folder, (path, fault) in found}


def prune(
    root: Path,
    version: str,
    *,
    incomplete: bool = False,
    everything: bool = False,
    dry_run: bool = False,
) -> list[Removal]:
    """Remove sets of another version, and files of sets that nothing reads any more.

    These are temporary files of killed writers, older than a day. `incomplete` also removes sets
    with missing shards, `everything` all sets; `dry_run` only returns what would be removed. Only
    files of this store are deleted, and only folders that are then empty. No other process may
    write the sets that are removed. StoreError if there is no store, or a file cannot be deleted.
    """
    removals = []
    for entry in listing(root):
        other = entry.record.get("version", version)
        reason = "all sets" if everything else f"of version {other}" if other != version else ""
        if incomplete and not (reason or entry.complete):
            reason = f"{entry.shards - entry.present} of {entry.shards} shards missing"
        if reason:
            removals.append(Removal(entry.folder, entry.size, reason))
        else:
            for path in _own_files(entry.folder):
                with suppress(FileNotFoundError):  # another process may have removed it
                    found = path.stat()
                    if path.suffix == ".tmp" and time.time() - found.st_mtime > _DAY:
                        removals.append(Removal(path, found.st_size, "temporary file"))
    for removal in [] if dry_run else removals:
        # A set keeps its key, and so is a set, until its shards are gone.
        is_set = removal.path.is_dir()
        for file in _own_files(removal.path) if is_set else [removal.path]:
            delete(file)
        if is_set:
            with suppress(OSError):  # somebody else's files may be in it
                removal.path.rmdir()
    return removals


def _sets(root: Path) -> Iterator[tuple[Path, ShardSet]]:
    """The sets of a store and their folders; other folders are passed over."""
    way_out = "choose another with --store"
    if not root.exists():
        raise StoreError(f"store {root} does not exist: {way_out}")
    with os_errors(StoreError, f"store {root} cannot be read", way_out):
        folders = sorted(path for path in root.iterdir() if path.is_dir())
    for folder in folders:
        with suppress(FileNotFoundError, StoreError):
            key = Key.read(folder)
            if folder.name == key.folder_name:
                yield folder, ShardSet(root, key)


def _own_files(folder: Path) -> list[Path]:
    """The files of a set that this package wrote, its key last."""
    with os_errors(StoreError, f"folder {folder} cannot be read", OTHER):
        paths = sorted(folder.iterdir())
    names = {path: match[1] for path in paths if (match := _TEMPORARY.fullmatch(path.name))}
    shards = [path for path in paths if shard_number(names.get(path, path.name)) >= 0]
    return [*shards, *(path for path, name in names.items() if name == KEY), folder / KEY]


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
