"""Writers that are killed, and several at once."""

import subprocess
import sys

import pytest

from fusenorm_openood.storage.keys import Key
from fusenorm_openood.storage.shards import ShardSet
from tests.storage.sets import RECORD, assert_same_bits, columns_of, full_set

# Forks writers and kills each after a while; a fork saves the seconds that imports take.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from fusenorm_openood.storage.shards import ShardSet
from fusenorm_openood.storage.shards import encode
from tests.storage.sets import RECORD, columns_of

shards = ShardSet(Path(sys.argv[1]), Key(RECORD, "digits", 400_000, 40))
encode(columns_of(shards, 0), "")  # imports what is imported on first use
chance = random.Random(0)
for trial in range(20):
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        for number in shards.missing():
            shards.write(number, columns_of(shards, number))
            os.write(begin, b"1")
    os.read(begun, 1)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

WRITER = """
import sys
from pathlib import Path
from fusenorm_openood.storage.shards import ShardSet
from tests.storage.sets import RECORD, columns_of

shards = ShardSet(Path(sys.argv[1]), Key(RECORD, "digits", 800, 8))
seed = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(shards.key.shard_count):
    shards.write(number, columns_of(shards, number, seed))
"""


def test_a_writer_killed_at_any_moment_leaves_no_damaged_shard(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["-9"] * 20
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 400_000, 40))
    present = shards.present()
    assert len(present) >= 20
    assert [error for _, error in shards.verify() if error] == []
    for number in present:
        assert_same_bits(shards.read(number), columns_of(shards, number))
    assert shards.missing() == list(range(len(present), shards.key.shard_count))


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same bits", "different bits"])
def test_two_processes_may_write_the_same_shards_at_once(tmp_path, seeds):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for seed in seeds
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 800, 8))
    assert shards.missing() == []
    assert len(list(shards.folder.iterdir())) == 1 + shards.key.shard_count * len(set(seeds))
    assert [error for _, error in shards.verify() if error] == []
    for number in range(shards.key.shard_count):
        written = [columns_of(shards, number, seed) for seed in seeds]
        first = min(shards.folder.glob(f"{number:06d}-*"))
        assert shards.present()[number] == first
        found = shards.read(number)["conf"].tolist()
        assert found in [columns["conf"].tolist() for columns in written]
    if seeds == (0, 0):
        assert_same_bits(shards.load(), full_set(tmp_path / "other", 800).load())
