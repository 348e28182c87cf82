"""Sets of shards that several test modules use."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusenorm_openood.storage.shards import Key, ShardSet

RECORD = {"version": "0", "checkpoint": "abc"}


def columns_of(shards: ShardSet, number: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of every kind."""
    rows = shards.span(number)
    random = np.random.default_rng([seed, number])
    return {
        "layer1.0": random.standard_normal(len(rows)).astype(np.float32),
        "conf": random.standard_normal(len(rows)),
        "row": np.arange(rows.start, rows.stop),
        "correct": random.random(len(rows)) < 0.5,
        "path": np.array([f"images/{row}.png" for row in rows], dtype=object),
        "feature": random.standard_normal((len(rows), 3)).astype(np.float32),
    }


def full_set(root: Path, rows: int = 50, shard_rows: int = 8, record: dict = RECORD) -> ShardSet:
    """A complete set of `columns_of`."""
    shards = ShardSet(root, Key(record, "digits", rows, shard_rows))
    for number in shards.missing():
        shards.write(number, columns_of(shards, number))
    return shards


def discard(shards: ShardSet, *numbers: int) -> None:
    """Delete the files of shards."""
    for number in numbers:
        for path in shards.folder.glob(f"{number:06d}-*"):
            path.unlink()


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name, values in one.items():
        assert values.dtype == other[name].dtype
        assert values.shape == other[name].shape
        if values.dtype == object:
            assert values.tolist() == other[name].tolist()
        else:
            assert values.tobytes() == other[name].tobytes()


def assert_intact(shards: ShardSet) -> None:
    for number in range(shards.key.shard_count):
        assert_same_bits(shards.read(number), columns_of(shards, number))


def forked(work: Callable[[], object]) -> int:
    """A child process that does something and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child
