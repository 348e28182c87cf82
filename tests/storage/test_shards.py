import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusenorm_openood.errors import StoreError
from fusenorm_openood.storage.keys import Key
from fusenorm_openood.storage.shards import ShardSet
from tests.storage.sets import assert_same_bits, columns_of, full_set

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def bits(dtype, shape):
    """Floating-point numbers of any bits: all NaNs, infinities, -0.0, denormals."""
    whole = np.dtype(dtype.replace("float", "uint"))
    return arrays(whole, shape).map(lambda values: values.view(dtype))


def columns(rows):
    kinds = [
        bits("float32", rows),
        bits("float64", rows),
        arrays(np.int64, rows),
        arrays(np.bool_, rows),
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"])), min_size=rows, max_size=rows
        ).map(lambda values: np.array([*values, None], dtype=object)[:-1]),
        bits("float32", (rows, 3)),
        bits("float64", (rows, 1)),
    ]
    return st.dictionaries(NAMES, st.one_of(kinds), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_bit_of_every_column_comes_back(data):
    rows = data.draw(st.integers(1, 9))
    written = data.draw(columns(rows))
    some = data.draw(st.lists(st.sampled_from(sorted(written)), unique=True))
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(Path(folder), Key({}, "set", rows, 10))
        first = shards.write(0, written)
        assert_same_bits(shards.read(0), written)
        assert_same_bits(shards.load(some), {name: written[name] for name in some})
        assert shards.write(0, dict(reversed(written.items()))) == first
        content = first.read_bytes()
        assert first.name == f"000000-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        assert len(shards.present()) == 1


def test_the_same_columns_are_the_same_bytes_in_other_stores_processes_and_memory(tmp_path):
    one = full_set(tmp_path / "one")
    code = (
        "import sys; from pathlib import Path; from tests.storage.sets import full_set\n"
        "full_set(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    files = {path.name: path.read_bytes() for path in one.present().values()}
    other = tmp_path / "other" / one.folder.name
    assert {path.name: path.read_bytes() for path in other.glob("*.parquet")} == files
    strided = {}
    for name, values in columns_of(one, 0).items():
        wide = np.empty((*values.shape, 2), values.dtype)
        wide[..., 0] = values
        strided[name] = wide[..., 0]
    assert one.write(0, strided).name in files


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 50, 64])
def test_a_set_of_any_size_is_written_and_loaded(tmp_path, rows):
    shards = ShardSet(tmp_path, Key({}, "digits", rows, 8))
    assert [row for number in range(shards.key.shard_count) for row in shards.span(number)] == list(
        range(rows)
    )
    assert shards.missing() == list(range(shards.key.shard_count))
    full_set(tmp_path, rows, record={})
    assert shards.missing() == []
    loaded = shards.load()
    parts = list(shards.iterate())
    assert len(parts) == shards.key.shard_count == (rows + 7) // 8
    if rows == 0:
        assert loaded == {}
    else:
        assert_same_bits(loaded, {n: np.concatenate([part[n] for part in parts]) for n in loaded})
        assert loaded["row"].tolist() == list(range(rows))
        assert loaded["path"][-1] == f"images/{rows - 1}.png"


def test_what_is_loaded_is_writable_memory_of_its_own(tmp_path):
    shards = full_set(tmp_path)
    for loaded in (shards.read(0), shards.load()):
        for values in loaded.values():
            assert values.flags.writeable
            values[:] = values[0]
    assert shards.load()["row"].tolist() == list(range(50))


def test_only_the_columns_asked_for_are_loaded(tmp_path):
    shards = full_set(tmp_path)
    assert list(shards.load(["row", "layer1.0"])) == ["row", "layer1.0"]
    assert list(next(shards.iterate(["conf"]))) == ["conf"]
    with pytest.raises(StoreError, match=r"no column 'layer1': choose from conf, correct, feature"):
        shards.load(["row", "layer1"])


def test_missing_shards_are_listed_and_not_loaded(tmp_path):
    shards = full_set(tmp_path)
    shards.discard(3)
    shards.discard(5)
    assert shards.missing() == [3, 5]
    for load in (shards.load, lambda: list(shards.iterate())):
        with pytest.raises(StoreError, match=r"2 of 7 shards of .* are missing \(3, 5\)"):
            load()
    with pytest.raises(StoreError, match=r"shard 3 of .* is missing"):
        shards.read(3)
    empty = ShardSet(tmp_path, Key({"other": 1}, "digits", 50, 2))
    with pytest.raises(
        StoreError, match=r"25 of 25 .*\(0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 15 more\)"
    ):
        empty.load()


@pytest.mark.parametrize("number", [-1, 7])
def test_a_shard_that_the_set_does_not_have_is_an_error(tmp_path, number):
    shards = full_set(tmp_path)
    for act in (shards.span, shards.read, lambda number: shards.write(number, {})):
        with pytest.raises(StoreError, match=f"has 7 shards, and none is {number}"):
            act(number)


@pytest.mark.parametrize(("rows", "shard_rows"), [(-1, 1), (1, 0), (1, -1)])
def test_a_set_of_negative_size_is_an_error(tmp_path, rows, shard_rows):
    with pytest.raises(StoreError, match="must be"):
        ShardSet(tmp_path, Key({}, "digits", rows, shard_rows))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(7), r"'x' of shard 0 is \[7\], not of 8 rows"),
        (np.zeros(9), "not of 8 rows"),
        (np.zeros(()), r"is \[\], not of 8 rows"),
        (np.zeros((8, 2, 2)), r"'x' is float64 \[8, 2, 2\], not"),
        (np.zeros((8, 0), np.float32), "not float32"),
        (np.zeros((8, 2), np.int64), "not float32"),
        (np.zeros(8, np.float16), "is float16"),
        (np.zeros(8, np.int32), "is int32"),
        (np.zeros(8, ">f8"), "is >f8"),
        (np.zeros(8, "<U3"), "is <U3"),
        (np.array([None] * 8), "is object"),
        (np.array(["a"] * 7 + [3], dtype=object), "is object"),
        (np.array(["a"] * 7 + ["\udc80"], dtype=object), "not valid Unicode"),
    ],
)
def test_columns_that_cannot_be_stored_exactly_are_errors(tmp_path, values, message):
    shards = ShardSet(tmp_path, Key({}, "digits", 50, 8))
    with pytest.raises(StoreError, match=message):
        shards.write(0, {"x": values})
    with pytest.raises(StoreError, match="has no columns"):
        shards.write(0, {})
    assert [path.name for path in shards.folder.iterdir()] == ["key.json"]


@pytest.mark.parametrize(
    "odd",
    [
        {"row": np.zeros(8)},
        {"row": np.zeros((8, 2), np.float32)},
        {"other": np.arange(8)},
        {"row": np.arange(8), "other": np.arange(8)},
    ],
)
def test_shards_with_different_columns_are_not_joined(tmp_path, odd):
    shards = ShardSet(tmp_path, Key({}, "digits", 24, 8))
    for number in range(3):
        shards.write(number, odd if number == 1 else {"row": np.arange(8)})
    with pytest.raises(StoreError, match=r"shards 0 and 1 of .* have different columns"):
        shards.load()


def test_of_two_files_of_one_shard_the_first_by_name_is_read(tmp_path):
    shards = ShardSet(tmp_path, Key({}, "digits", 8, 8))
    paths = [shards.write(0, {"x": np.full(8, float(value))}) for value in range(6)]
    first = paths.index(min(paths))
    assert len(list(shards.folder.glob("*.parquet"))) == 6
    assert shards.read(0)["x"].tolist() == [first] * 8
    assert shards.load()["x"].tolist() == [first] * 8
    shards.discard(0)
    assert shards.missing() == [0]
    assert [path.name for path in shards.folder.iterdir()] == ["key.json"]


def test_importing_the_store_imports_neither_pyarrow_nor_torch():
    code = (
        "import sys, fusenorm_openood.storage.maintenance\n"
        "assert not {'pyarrow', 'torch', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
