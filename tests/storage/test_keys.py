import hashlib
import json
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest

from fusenorm_openood.errors import StoreError
from fusenorm_openood.storage.files import file_digest
from fusenorm_openood.storage.shards import Key, ShardSet, digest


def test_the_digest_is_that_of_canonical_json():
    record = {"b": (1, 0.1), "a": "é"}
    text = '{"a":"\\u00e9","b":[1,0.1]}'
    assert digest(record) == hashlib.sha256(text.encode()).hexdigest()[:20]
    assert digest(MappingProxyType(OrderedDict(record))) == digest(record)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (True, 1), (None, "null"), (0.0, -0.0)])
def test_values_of_different_types_have_different_digests(one, other):
    assert digest({"value": one}) != digest({"value": other})


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), b"", {1}, {1: 2}),
        *(np.arange(2), np.int64(3), object(), 1j, range(3)),
    ],
)
def test_values_that_json_cannot_express_are_type_errors(value):
    for record in ({"value": value}, {"value": [{"value": (value,)}]}):
        with pytest.raises(TypeError):
            digest(record)


def test_keys_that_are_not_strings_do_not_collide_with_strings():
    with pytest.raises(TypeError, match="key 1 "):
        digest({1: 2, "1": 3})


@pytest.mark.parametrize("size", [0, 2**20 + 1])
def test_file_digest_is_the_sha256_of_the_content(tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_key_of_a_set_is_written_once_and_readable(tmp_path):
    record = {"version": "1.0", "taps": ("layer1", "layer2"), "temperature": 0.1}
    folder = ShardSet(tmp_path, Key(record, "iNaturalist", 5, 2)).folder
    text = (folder / "key.json").read_text(encoding="utf-8")
    key = json.loads(text)
    assert key["record"] == {**record, "taps": ["layer1", "layer2"]}
    assert (key["name"], key["rows"], key["shard_rows"]) == ("iNaturalist", 5, 2)
    assert text.count("\n") > 8
    ShardSet(tmp_path, Key(record, "iNaturalist", 5, 2))
    assert (folder / "key.json").read_text(encoding="utf-8") == text
    assert [path.name for path in folder.iterdir()] == ["key.json"]


@pytest.mark.parametrize("name", ["", "../up", "a/b\\c:d\0", "Ünïcode", "x" * 300, "."])
def test_any_name_becomes_one_folder_of_the_store(tmp_path, name):
    shards = ShardSet(tmp_path / "store", Key({}, name, 0))
    assert shards.folder.parent == tmp_path / "store"
    assert [path.name for path in (tmp_path / "store").iterdir()] == [shards.folder.name]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_with_another_record_is_never_used(tmp_path):
    folder = ShardSet(tmp_path, Key({"seed": 0}, "cifar10", 5)).folder
    content = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps({**content, "record": {"seed": 1}}))
    with pytest.raises(StoreError, match="has rows of another record"):
        ShardSet(tmp_path, Key({"seed": 0}, "cifar10", 5))


def test_a_set_with_other_rows_is_never_used(tmp_path):
    ShardSet(tmp_path, Key({}, "cifar10", 5, 2))
    for rows, shard_rows in ((6, 2), (5, 3)):
        with pytest.raises(StoreError, match=r"has 5 rows in shards of 2, not"):
            ShardSet(tmp_path, Key({}, "cifar10", rows, shard_rows))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": "fusenorm shards 1"}', "\xff", '{"format": "2"}']
)
def test_a_damaged_key_is_an_error(tmp_path, text):
    folder = ShardSet(tmp_path, Key({}, "cifar10", 5)).folder
    (folder / "key.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"key.json is (damaged|not of format)"):
        ShardSet(tmp_path, Key({}, "cifar10", 5))


def test_a_store_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "store").touch()
    with pytest.raises(StoreError):
        ShardSet(tmp_path / "store", Key({}, "cifar10", 5))
