"""A shard is read as it was written, whatever happens to the files, or not at all."""

import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.storage.shards import Key, ShardSet
from tests.storage.sets import (
    RECORD,
    assert_intact,
    assert_same_bits,
    columns_of,
    discard,
    forked,
    full_set,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def bits(dtype, shape):
    """Floating-point numbers of any bits: all NaNs, infinities, -0.0, denormals."""
    whole = np.dtype(dtype.replace("float", "uint"))
    return arrays(whole, shape).map(lambda values: values.view(dtype))


def columns(rows):
    texts = st.lists(TEXTS, min_size=rows, max_size=rows)
    kinds = [
        bits("float32", rows),
        bits("float64", rows),
        arrays(np.int64, rows),
        arrays(np.bool_, rows),
        texts.map(lambda values: np.array([*values, None], dtype=object)[:-1]),
        bits("float32", (rows, 3)),
        bits("float64", (rows, 1)),
    ]
    return st.dictionaries(TEXTS, st.one_of(kinds), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_bit_of_every_column_comes_back(data):
    rows = data.draw(st.integers(1, 9))
    written = data.draw(columns(rows))
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(Path(folder), Key({}, "set", rows, 10))
        first = shards.write(0, written)
        assert_same_bits(shards.read(0), written)
        assert shards.write(0, dict(reversed(written.items()))) == first
        checksum = hashlib.sha256(first.read_bytes()).hexdigest()[:16]
        assert first.name == f"000000-{checksum}.safetensors"
        assert len(shards.present()) == 1


WRITER = """
import sys
from pathlib import Path

sys.modules.update(pyarrow=None, fsspec=None, torch=None, pandas=None)  # not installed
import numpy as np
from fusenorm_openood.storage.shards import Key, ShardSet

columns = {"b": np.arange(3.0), "a": np.array(["x", "", "é"], dtype=object), "c": np.ones((3, 2))}
ShardSet(Path(sys.argv[1]), Key({"seed": 0}, "digits", 3)).write(0, columns)
"""


def test_the_same_columns_are_the_same_bytes_in_other_processes_and_memory(tmp_path):
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "other")], check=True)
    shards = ShardSet(tmp_path, Key({"seed": 0}, "digits", 3))
    other = ShardSet(tmp_path / "other", shards.key)
    columns = other.read(0)
    assert columns["a"].tolist() == ["x", "", "é"]
    strided = {}
    for name, values in columns.items():
        wide = np.empty((*values.shape, 2), values.dtype)
        wide[..., 0] = values
        strided[name] = wide[..., 0]
    for values in (columns, strided):
        path = shards.write(0, values)
        assert path.name == other.present()[0].name
        assert path.read_bytes() == other.present()[0].read_bytes()


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_a_set_of_any_size_is_written_and_read(tmp_path, rows):
    shards = ShardSet(tmp_path, Key({}, "digits", rows, 8))
    numbers = range(shards.key.shard_count)
    assert [row for number in numbers for row in shards.span(number)] == list(range(rows))
    assert shards.missing() == list(numbers)
    assert_intact(full_set(tmp_path, rows, record={}))
    assert shards.missing() == []


def test_what_is_read_is_writable_memory_of_its_own(tmp_path):
    shards = full_set(tmp_path)
    for values in shards.read(0).values():
        assert values.flags.writeable
        values[:] = values[0]
    assert_intact(shards)


def test_missing_shards_are_listed_and_not_read(tmp_path):
    shards = full_set(tmp_path)
    discard(shards, 3, 5)
    assert shards.missing() == [3, 5]
    with pytest.raises(StoreError, match=r"shard 3 of .* is missing"):
        shards.read(3)


@pytest.mark.parametrize("number", [-1, 7])
def test_a_shard_that_the_set_does_not_have_is_an_error(tmp_path, number):
    shards = full_set(tmp_path)
    for act in (shards.span, shards.read, lambda number: shards.write(number, {})):
        with pytest.raises(StoreError, match=f"has 7 shards, and none is {number}"):
            act(number)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(7), "7"),
        (np.zeros(()), r"\[\]"),
        (np.zeros((8, 2, 2)), "2, 2"),
        (np.zeros(8, np.float16), "float16"),
        (np.zeros(8, np.uint8), "uint8"),
        (np.zeros(8, ">f8"), ">f8"),
        (np.zeros(8, "<U3"), "<U3"),
        (np.array([None] * 8), "object"),
        (np.array(["a"] * 7 + [3], dtype=object), "object"),
    ],
)
def test_columns_that_cannot_be_stored_exactly_are_errors(tmp_path, values, message):
    shards = ShardSet(tmp_path, Key({}, "digits", 50, 8))
    with pytest.raises(StoreError, match=f"column 'x' .*{message}"):
        shards.write(0, {"x": values})
    with pytest.raises(StoreError, match="must have columns"):
        shards.write(0, {})
    assert [path.name for path in shards.folder.iterdir()] == ["key.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete set, and one of another record with the same rows."""
    root = tmp_path_factory.mktemp("store")
    return full_set(root), full_set(root, record={**RECORD, "seed": 1})


def mutate(folder, other, chance):
    """Damage one file of a folder, in a way that a disk, a user or a crash could."""
    files = sorted(folder.glob("*.safetensors"))
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
        path.rename(folder / f"{path.name[:7]}{chance.randrange(16**16):016x}.safetensors")
    else:
        shutil.copy(next(other.glob(f"{path.name[:7]}*")), folder)
        if chance.random() < 0.5:
            path.unlink()


def test_no_mutation_of_files_changes_what_is_read(whole, tmp_path):
    chance = random.Random(0)
    noticed = 0
    for trial in range(100):
        shutil.copytree(whole[0].folder, tmp_path / str(trial) / whole[0].folder.name)
        shards = ShardSet(tmp_path / str(trial), whole[0].key)
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
        noticed += bool(lost)
        for number in lost:
            shards.write(number, columns_of(shards, number))
        assert_intact(shards)
    assert noticed > 60


@pytest.mark.parametrize("kind", ["noise", "safetensors", "label", "nothing"])
def test_other_files_under_a_name_with_their_checksum_are_damaged(tmp_path, kind):
    shards = full_set(tmp_path)
    discard(shards, 2)
    metadata = {"fusenorm": "other"} if kind == "label" else None
    content = {"noise": random.Random(0).randbytes(500), "nothing": b""}.get(
        kind, save({"x": np.zeros(8)}, metadata)
    )
    name = f"000002-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (shards.folder / name).write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"000002-.* is damaged \(.*\): delete it"):
        shards.read(2)


def test_a_shard_that_cannot_be_opened_is_damaged(tmp_path):
    shards = full_set(tmp_path)
    path = shards.present()[2]
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedShardError, match=r"000002-.* cannot be read"):
        shards.read(2)


@pytest.mark.parametrize(
    "name",
    [
        "000002-0123456789abcdef.safetensors.0123456789abcdef0123456789abcdef.tmp",
        "000002-0123456789ABCDEF.safetensors",
        "000002-0123456789abcde.safetensors",
        "0000002-0123456789abcdef.safetensors",
        "-00002-0123456789abcdef.safetensors",
        "٠٠٠٠٠٢-0123456789abcdef.safetensors",
        "000099-0123456789abcdef.safetensors",
        "000002-0123456789abcdef.parquet",  # of 0.2.0
        "README",
    ],
)
def test_files_of_other_names_are_ignored(whole, tmp_path, name):
    shards = ShardSet(tmp_path, whole[0].key)
    (shards.folder / name).write_bytes(whole[0].present()[2].read_bytes())
    assert shards.missing() == list(range(7))
    full_set(tmp_path)
    assert_intact(shards)
    assert (shards.folder / name).exists()


def test_a_full_disk_is_one_sentence_and_keeps_what_was_written(tmp_path):
    shards = ShardSet(tmp_path, Key(RECORD, "digits", 20_000, 10_000))
    shards.write(0, {"x": np.zeros(10_000)})
    read, write = os.pipe()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            shards.write(1, {"x": np.zeros(10_000)})
        except StoreError as error:
            os.write(write, str(error).encode())

    os.waitpid(forked(limited), 0)
    assert os.read(read, 1000).decode() == (
        f"shard 1 cannot be written to {shards.folder} (File too large): "
        "free disk space, or choose another store"
    )
    assert len(list(shards.folder.iterdir())) == 2
    assert shards.missing() == [1]


def test_a_folder_that_is_not_writable_is_one_sentence(tmp_path):
    shards = full_set(tmp_path)
    before = shards.folder.rename(tmp_path / "before")
    shards.folder.touch()  # a file in its place: also root cannot write into it
    with pytest.raises(StoreError, match=r"shard 0 cannot be written to .*: free disk space"):
        shards.write(0, columns_of(shards, 0))
    with pytest.raises(StoreError, match="cannot be read"):
        shards.missing()
    shards.folder.unlink()
    before.rename(shards.folder)
    assert_intact(shards)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_set_is_read_but_not_written(tmp_path):
    shards = full_set(tmp_path)
    shards.folder.chmod(0o555)
    try:
        assert_intact(ShardSet(tmp_path, shards.key))
        with pytest.raises(StoreError, match=r"cannot be written to .* \(Permission denied\)"):
            shards.write(0, columns_of(shards, 1))
    finally:
        shards.folder.chmod(0o755)


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
