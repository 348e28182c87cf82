"""Rows that a store has are read, the others are computed, shared out among processes."""

import itertools
import threading
import time

import numpy as np
import pytest

from fusenorm_openood.storage import stored as module
from fusenorm_openood.storage.shards import Key, ShardSet
from fusenorm_openood.storage.stored import StoredScores, row_batches, shard_batches, stored_row

KEY = Key({"content": "all"}, "images", 10, 4)  # shards of 4, 4 and 2 rows


class Computing:
    """Computes rows by squaring their numbers, and notes the shards; those of `fails` fail."""

    def __init__(self, store, key=KEY, fails=(), **how):
        self.log, self.fails = [], fails
        self.stored = StoredScores(store, key, self, **how)

    def __call__(self, numbers):
        for number in numbers:
            if number in self.fails:
                raise KeyError(number)
            self.log.append(number)
            yield {"row": np.array(self.stored.shards.span(number)) ** 2}

    def rows(self):
        return np.concatenate([columns["row"] for columns in self.stored]).tolist()


SQUARES = [row**2 for row in range(10)]


@pytest.fixture
def rank(monkeypatch):
    """Makes this process one of two."""

    def set_rank(number):
        for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))

    return set_rank


def damage(store, number):
    (path,) = store.glob(f"images-*/{number:06d}-*")
    path.write_bytes(path.read_bytes()[:-1])


def test_what_the_store_has_is_not_computed(tmp_path):
    first = Computing(tmp_path)
    assert first.rows() == SQUARES
    assert first.log == [0, 1, 2]
    again = Computing(tmp_path)
    assert again.rows() == SQUARES
    assert again.log == []


def test_shards_are_computed_when_they_are_needed_and_survive_a_failure(tmp_path):
    failing = Computing(tmp_path, fails=[1])
    rows = iter(failing.stored)
    assert next(rows)["row"].tolist() == SQUARES[:4]
    assert failing.log == [0]
    with pytest.raises(KeyError):
        next(rows)
    again = Computing(tmp_path)
    assert again.rows() == SQUARES
    assert again.log == [1, 2]


def test_a_damaged_shard_is_computed_again_and_said(tmp_path, caplog):
    Computing(tmp_path).rows()
    damage(tmp_path, 1)
    again = Computing(tmp_path)
    assert again.rows() == SQUARES
    assert again.log == [1]
    assert "000001-" in (said := caplog.messages[0])
    assert said.endswith("is computed again")
    assert len(list(tmp_path.glob("images-*/000001-*"))) == 1


def test_others_write_the_missing_shards_in_any_order(tmp_path):
    written, reader = Computing(tmp_path), Computing(tmp_path)
    rows = [columns["row"] for columns in reader.stored.after(written.stored.computed([2, 0, 1]))]
    assert np.concatenate(rows).tolist() == SQUARES
    assert (written.log, reader.log) == ([2, 0, 1], [])


def test_an_empty_set_has_no_rows(tmp_path):
    assert list(Computing(tmp_path, Key({"content": "all"}, "images", 0)).stored) == []


@pytest.mark.parametrize("start", [0, 1])
def test_processes_compute_their_shares_and_wait_for_the_others(tmp_path, rank, start, caplog):
    rank(1)
    other = Computing(tmp_path, start=start)
    other.stored.compute_share()
    assert other.log == [n for n in range(3) if (n + start) % 2]
    rank(0)
    mine = Computing(tmp_path, start=start)
    assert mine.rows() == SQUARES
    assert mine.log == [n for n in range(3) if (n + start) % 2 == 0]
    assert not caplog.messages


def test_a_process_that_waits_says_so(tmp_path, rank, monkeypatch, caplog):
    rank(0)
    monkeypatch.setattr(module, "WORD", 0.05)
    late = threading.Timer(0.3, lambda: list(Computing(tmp_path).stored.computed([1])))
    late.start()
    waiting = Computing(tmp_path)
    assert waiting.rows() == SQUARES
    assert waiting.log == [0, 2]
    assert caplog.text.count("waiting for other processes of WORLD_SIZE=2") == 1
    late.join()


def test_shards_of_processes_that_are_silent_are_computed(tmp_path, rank, monkeypatch):
    rank(1)
    monkeypatch.setattr(module, "WORD", 0.0)
    monkeypatch.setattr(module, "SILENCE", 0.1)
    waiting = Computing(tmp_path)
    assert waiting.rows() == SQUARES
    assert waiting.log == [1, 0, 2]


@pytest.mark.parametrize("shared", [True, False])
def test_a_damaged_shard_of_another_process_is_left_to_it_for_a_while(
    tmp_path, rank, monkeypatch, shared
):
    monkeypatch.setattr(module, "OWNER_TIME", 0.3)
    Computing(tmp_path).rows()
    damage(tmp_path, 1)
    rank(0)
    begun = time.monotonic()
    reader = Computing(tmp_path, shared=shared)
    assert reader.rows() == SQUARES
    assert reader.log == [1]
    assert (time.monotonic() - begun >= 0.3) == shared
    damage(tmp_path, 1)
    if shared:
        monkeypatch.setattr(module, "OWNER_TIME", 60)

        def compute_own():
            list(Computing(tmp_path).stored.computed([1]))

        owner = threading.Timer(0.1, compute_own)
        owner.start()
        with_owner = Computing(tmp_path)
        assert with_owner.rows() == SQUARES
        assert with_owner.log == []
        owner.join()


def taken(content):
    """Of a set with powers: its squares."""
    return (lambda columns: {"row": columns["square"]}) if content == "powers" else None


def write_powers(store, content="powers", numbers=range(3)):
    shards = ShardSet(store, Key({"content": content}, "images", 10, 4))
    for number in numbers:
        rows = np.array(shards.span(number))
        shards.write(number, {"square": rows**2, "cube": rows**3})


@pytest.mark.parametrize(("content", "found"), [("powers", True), ("other", False)])
def test_a_complete_set_that_contains_the_rows_is_read_instead(tmp_path, content, found):
    write_powers(tmp_path, content)
    reader = Computing(tmp_path, taken=taken)
    assert reader.rows() == SQUARES
    assert reader.log == ([] if found else [0, 1, 2])
    assert len(list(tmp_path.iterdir())) == (1 if found else 2)


def test_rows_that_an_incomplete_or_damaged_set_lacks_are_computed(tmp_path, caplog):
    write_powers(tmp_path, numbers=[0, 1])
    reader = Computing(tmp_path / "2", taken=taken)
    assert reader.rows() == SQUARES
    assert reader.log == [0, 1, 2]
    write_powers(tmp_path, numbers=[2])
    damage(tmp_path, 1)
    reader = Computing(tmp_path, taken=taken)
    assert reader.rows() == SQUARES
    assert reader.log == [1]
    assert caplog.text.count("computed again") == 1


def test_a_wait_ends_when_another_process_takes_the_rows_of_a_larger_set(tmp_path, rank):
    rank(0)
    write = threading.Timer(0.2, lambda: write_powers(tmp_path))
    write.start()
    reader = Computing(tmp_path, taken=taken)
    assert reader.rows() == SQUARES
    assert reader.log == [0, 2]
    write.join()


def test_one_row_is_computed_once_unless_there_is_none(tmp_path):
    given = iter([None, 1, 2])

    def row():
        value = next(given)
        return None if value is None else {"x": np.array([value])}

    found = [stored_row(tmp_path, {"a": 1}, "one", row) for _ in range(3)]
    assert found[0] is None
    assert [columns["x"][0] for columns in found[1:]] == [1, 1]
    (path,) = tmp_path.glob("one-*/000000-*")
    path.write_bytes(b"")
    assert stored_row(tmp_path, {"a": 1}, "one", row)["x"] == [2]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (4, 4), (5, 4), (11, 4), (1000, 64)])
def test_batches_are_as_few_and_as_equal_as_possible(rows, batch_size):
    batches = row_batches(range(rows), batch_size)
    assert [row for batch in batches for row in batch] == list(range(rows))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-rows // batch_size)


def test_no_batch_has_rows_of_two_shards(tmp_path):
    shards = ShardSet(tmp_path, KEY)
    found = {number: list(b) for number, b in shard_batches(shards, [2, 0], iter, 3)}
    assert {n: list(itertools.chain(*batches)) for n, batches in found.items()} == {
        2: [8, 9],
        0: [0, 1, 2, 3],
    }
