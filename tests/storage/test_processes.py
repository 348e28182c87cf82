"""Writers that are killed, and several at once."""

import os
import random
import signal
import time

import pytest

from fusenorm_openood.storage.shards import Key, ShardSet
from tests.storage.sets import RECORD, assert_same_bits, columns_of, full_set


def forked(work):
    """A child process that does something and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_no_damaged_shard(tmp_path):
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 400_000, 40))
    chance = random.Random(0)
    for _ in range(20):
        begun, begin = os.pipe()

        def write(begin=begin):
            for number in shards.missing():
                shards.write(number, columns_of(shards, number))
                os.write(begin, b"1")

        child = forked(write)
        os.read(begun, 1)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    present = shards.present()
    assert len(present) >= 20
    assert [error for _, error in shards.verify() if error] == []
    for number in present:
        assert_same_bits(shards.read(number), columns_of(shards, number))
    assert shards.missing() == list(range(len(present), shards.key.shard_count))


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same bits", "different bits"])
def test_two_processes_may_write_the_same_shards_at_once(tmp_path, seeds):
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 200, 8))

    def write(seed):
        for number in range(shards.key.shard_count):
            shards.write(number, columns_of(shards, number, seed))

    for child in [forked(lambda seed=seed: write(seed)) for seed in seeds]:
        os.waitpid(child, 0)
    assert shards.missing() == []
    assert len(list(shards.folder.iterdir())) == 1 + shards.key.shard_count * len(set(seeds))
    assert [error for _, error in shards.verify() if error] == []
    for number in range(shards.key.shard_count):
        assert shards.present()[number] == min(shards.folder.glob(f"{number:06d}-*"))
        found = shards.read(number)["conf"].tolist()
        assert found in [columns_of(shards, number, seed)["conf"].tolist() for seed in seeds]
    if seeds == (0, 0):
        other = full_set(tmp_path / "other", 200)
        assert [p.name for p in shards.present().values()] == [
            p.name for p in other.present().values()
        ]
