import json
import os
import time

import pytest

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.storage.maintenance import listing, prune, verify
from tests.storage.sets import RECORD, discard, full_set

OTHER = {**RECORD, "version": "1"}


@pytest.fixture
def store(tmp_path):
    """A store with a complete set, an incomplete one, one of another version, and other folders."""
    root = tmp_path / "store"
    sets = {
        "complete": full_set(root),
        "incomplete": full_set(root, record={**RECORD, "seed": 1}),
        "other version": full_set(root, record=OTHER),
        "no version": full_set(root, record={"seed": 2}),
    }
    discard(sets["incomplete"], 1)
    (root / "notes").mkdir()
    (root / "notes" / "000000-0123456789abcdef.safetensors").write_text("mine")
    (root / "keyed").mkdir()
    (root / "keyed" / "key.json").write_text('{"private": 1}')
    (root / "README").touch()
    copied = json.loads((sets["complete"].folder / "key.json").read_text())
    (root / "renamed").mkdir()
    (root / "renamed" / "key.json").write_text(json.dumps(copied))
    return root, sets


def leave_temporary(folder, age):
    path = folder / f"000001-0123456789abcdef.safetensors.{'0123456789abcdef' * 2}.tmp"
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_listing_has_every_set_and_nothing_else(store):
    root, sets = store
    leave_temporary(sets["complete"].folder, 0)
    entries = {entry.folder: entry for entry in listing(root)}
    assert sorted(entries) == sorted(shards.folder for shards in sets.values())
    complete = entries[sets["complete"].folder]
    assert (complete.record, complete.rows) == (RECORD, 50)
    assert (complete.present, complete.shards, complete.complete) == (7, 7, True)
    files = sets["complete"].folder.iterdir()
    assert complete.size == sum(path.stat().st_size for path in files)
    incomplete = entries[sets["incomplete"].folder]
    assert (incomplete.present, incomplete.complete) == (6, False)


def test_verify_names_the_damaged_shards_also_those_that_are_not_read(store):
    root, sets = store
    assert set(verify(root).values()) == {None}
    assert len(verify(root)) == 7 + 6 + 7 + 7
    shards = sets["complete"]
    cut = shards.present()[4]
    cut.write_bytes(cut.read_bytes()[:-1])
    second = shards.folder / "000005-ffffffffffffffff.safetensors"
    second.touch()
    damaged = {path: error for path, error in verify(root).items() if error}
    assert set(damaged) == {cut, second}
    for path, error in damaged.items():
        assert isinstance(error, DamagedShardError)
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({}, ["other version"]),
        ({"incomplete": True}, ["incomplete", "other version"]),
        ({"everything": True}, ["complete", "incomplete", "no version", "other version"]),
    ],
)
def test_prune_removes_what_is_asked_for_and_nothing_else(store, options, removed):
    root, sets = store
    others = {path for path in root.rglob("*") if path.parent.name in ("notes", "keyed", "renamed")}
    sizes = {entry.folder: entry.size for entry in listing(root)}
    before = sorted(root.rglob("*"))
    planned = prune(root, "0", **options, dry_run=True)
    assert sorted(root.rglob("*")) == before
    assert prune(root, "0", **options) == planned
    folders = {sets[name].folder for name in removed}
    assert {removal.path: removal.size for removal in planned} == {
        folder: sizes[folder] for folder in folders
    }
    for name, shards in sets.items():
        assert shards.folder.exists() == (name not in removed)
    assert (root / "README").exists()
    assert all(path.exists() for path in others)
    assert prune(root, "0", **options) == []


def test_prune_keeps_files_of_others_inside_a_set(store):
    root, sets = store
    folder = sets["complete"].folder
    (folder / "notes.txt").touch()
    (folder / "notes").mkdir()
    prune(root, "0", everything=True)
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "notes.txt"]


@pytest.mark.parametrize("age", [-(10**7), 0, 3600])
def test_prune_keeps_temporary_files_of_writers_that_may_be_alive(store, age):
    root, sets = store
    path = leave_temporary(sets["complete"].folder, age)
    assert path not in [removal.path for removal in prune(root, "0")]
    assert path.exists()


def test_prune_removes_temporary_files_of_killed_writers(store):
    root, sets = store
    path = leave_temporary(sets["incomplete"].folder, 2 * 24 * 3600)
    assert sets["incomplete"].missing() == [1]
    assert (path, 4) in [(removal.path, removal.size) for removal in prune(root, "0")]
    assert not path.exists()
    assert sets["incomplete"].missing() == [1]


def test_parquet_shards_of_0_2_0_are_missing_and_go_with_their_set(store):
    root, sets = store
    folder = sets["complete"].folder
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".parquet"))
    (entry,) = (entry for entry in listing(root) if entry.folder == folder)
    assert (entry.present, entry.complete) == (0, False)
    assert entry.size == sum(path.stat().st_size for path in folder.iterdir())
    assert not any(path.parent == folder for path in verify(root))
    prune(root, "0", everything=True)
    assert not folder.exists()


@pytest.mark.parametrize("act", [listing, verify, lambda root: prune(root, "0")])
def test_a_store_that_is_a_file_is_an_error(tmp_path, act):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"store .*file cannot be read"):
        act(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert len(act(tmp_path / "empty")) == 0
