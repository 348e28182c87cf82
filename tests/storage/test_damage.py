"""Whatever happens to the files, a shard is read as it was written or not at all."""

import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.storage.keys import Key
from fusenorm_openood.storage.shards import ShardSet
from tests.storage.sets import RECORD, assert_same_bits, columns_of, full_set


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete set, and one of another record with the same rows."""
    root = tmp_path_factory.mktemp("store")
    return full_set(root), full_set(root, record={**RECORD, "seed": 1})


def mutate(folder, other, chance):
    """Damage one file of a folder, in a way that a disk, a user or a crash could."""
    files = sorted(folder.glob("*.parquet"))
    path, second = chance.sample(files, 2)
    content = path.read_bytes()
    kind = chance.choice(["flip", "cut", "extend", "empty", "swap", "number", "checksum", "other"])
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 1, 5])):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "extend":
        path.write_bytes(content + chance.randbytes(chance.randrange(1, 9)))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "swap":
        path.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif kind == "number":  # the checksum in the name still holds
        path.rename(folder / f"{chance.randrange(9):06d}{path.name[6:]}")
    elif kind == "checksum":
        path.rename(folder / f"{path.name[:7]}{chance.randrange(16**16):016x}.parquet")
    else:
        shutil.copy(next(other.glob(f"{path.name[:7]}*")), folder)
        if chance.random() < 0.5:
            path.unlink()


@pytest.mark.parametrize("seed", range(6))
def test_no_mutation_of_files_changes_what_is_read(whole, tmp_path, seed):
    chance = random.Random(seed)
    noticed = 0
    for trial in range(50):
        shutil.copytree(whole[0].folder, tmp_path / str(trial) / whole[0].folder.name)
        shards = full_set_of(tmp_path / str(trial))
        mutate(shards.folder, whole[1].folder, chance)
        lost = []
        for number in range(shards.key.shard_count):
            try:
                assert_same_bits(shards.read(number), columns_of(shards, number))
            except DamagedShardError:
                lost.append(number)
            except StoreError:
                assert number in shards.missing()
                lost.append(number)
        if lost:
            noticed += 1
            with pytest.raises(StoreError):
                shards.load(["row"])
        for number in lost:
            shards.discard(number)
            shards.write(number, columns_of(shards, number))
        assert_same_bits(shards.load(), whole[0].load())
    assert noticed > 30


def full_set_of(root):
    return ShardSet(root, Key(RECORD, "digits", 50, 8))


@pytest.mark.parametrize("kind", ["noise", "parquet", "label", "nothing"])
def test_other_files_under_a_name_with_their_checksum_are_damaged(tmp_path, kind):
    shards = full_set(tmp_path)
    path = shards.present()[2]
    if kind == "noise":
        content = random.Random(0).randbytes(500)
    elif kind == "nothing":
        content = b""
    else:
        metadata = {"fusenorm": "other"} if kind == "label" else None
        table = pa.table({"x": np.zeros(8)}).replace_schema_metadata(metadata)
        parquet.write_table(table, path)
        content = path.read_bytes()
    path.unlink()
    path = shards.folder / f"000002-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    path.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"000002-.* is damaged \(.*\): delete it"):
        shards.read(2)


def test_a_shard_that_cannot_be_opened_is_damaged(tmp_path):
    shards = full_set(tmp_path)
    path = shards.present()[2]
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedShardError, match=r"000002-.* cannot be read"):
        shards.read(2)
    with pytest.raises(StoreError, match=r"000002-.* cannot be deleted"):
        shards.discard(2)


@pytest.mark.parametrize(
    "name",
    [
        "000002-0123456789abcdef.parquet.0123456789abcdef0123456789abcdef.tmp",
        "000002-0123456789ABCDEF.parquet",
        "000002-0123456789abcde.parquet",
        "0000002-0123456789abcdef.parquet",
        "2-0123456789abcdef.parquet",
        "-00002-0123456789abcdef.parquet",
        "000002-0123456789abcdef.parquet~",
        "٠٠٠٠٠٢-0123456789abcdef.parquet",
        "000099-0123456789abcdef.parquet",
        "README",
    ],
)
def test_files_of_other_names_are_ignored(whole, tmp_path, name):
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 50, 8))
    (shards.folder / name).write_bytes(whole[0].present()[2].read_bytes())
    assert shards.missing() == list(range(7))
    full_set(tmp_path)
    assert_same_bits(shards.load(), whole[0].load())
    shards.discard(2)
    assert shards.missing() == [2]
    assert (shards.folder / name).exists()


def test_times_in_the_future_or_the_past_change_nothing(whole, tmp_path):
    shards = full_set(tmp_path)
    for number, path in shards.present().items():
        os.utime(path, (number * 2**31,) * 2)
    assert shards.missing() == []
    assert_same_bits(shards.load(), whole[0].load())


def test_a_full_disk_is_one_sentence_and_keeps_what_was_written(tmp_path):
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 20_000, 10_000))
    shards.write(0, {"x": np.zeros(10_000)})

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from fusenorm_openood.errors import StoreError\n"
        "from fusenorm_openood.storage.shards import ShardSet\n"
        "from tests.storage.sets import RECORD\n"
        "shards = ShardSet(Path(sys.argv[1]), RECORD, 'digits', 20_000, 10_000)\n"
        "try: shards.write(1, {'x': np.random.default_rng(0).random(10_000)})\n"
        "except StoreError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        preexec_fn=limit, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == (
        f"shard 1 cannot be written to {shards.folder} (File too large): "
        "free disk space, or choose another store\n"
    )
    assert len(list(shards.folder.iterdir())) == 2
    assert shards.missing() == [1]
    assert shards.read(0)["x"].tolist() == [0.0] * 10_000


def test_a_folder_that_is_not_writable_is_one_sentence(tmp_path):
    shards = full_set(tmp_path)
    shards.discard(0)
    before = shards.folder.rename(tmp_path / "before")
    shards.folder.touch()  # a file in its place: also root cannot write into it
    with pytest.raises(StoreError, match=r"shard 0 cannot be written to .*: free disk space"):
        shards.write(0, columns_of(shards, 0))
    with pytest.raises(StoreError, match="cannot be read"):
        shards.missing()
    shards.folder.unlink()
    before.rename(shards.folder)
    assert shards.missing() == [0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_set_is_read_but_not_written(tmp_path):
    shards = full_set(tmp_path)
    shards.folder.chmod(0o555)
    try:
        assert_same_bits(full_set_of(tmp_path).load(), shards.load())
        with pytest.raises(StoreError, match=r"cannot be written to .* \(Permission denied\)"):
            shards.write(0, columns_of(shards, 1))
        with pytest.raises(StoreError, match="cannot be deleted"):
            shards.discard(0)
    finally:
        shards.folder.chmod(0o755)
