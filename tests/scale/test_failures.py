"""Whatever fails, finished shards are kept, and the next run gives the right table."""

import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest

from fusenorm_openood.storage import stored as loading
from fusenorm_openood.storage.maintenance import verify
from tests.scale.commands import ended, log_of, run, scored_twice, start
from tests.scale.test_reuse import without_network_and_images


@pytest.fixture(scope="module")
def table(short, tmp_path_factory):
    """What an uninterrupted evaluation prints, without a store."""
    (done,) = run(tmp_path_factory.mktemp("live"), short.argv("eval", "none"))
    assert done.status == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """A folder with a complete store with shards of 8 images, and its log."""
    home = tmp_path_factory.mktemp("whole")
    (done,) = run(home, short.argv("eval", home / "store"), shard=8)
    assert done.status == 0, done.err
    return home


@pytest.fixture
def store(whole, tmp_path):
    """A copy of the complete store."""
    return shutil.copytree(whole / "store", tmp_path / "store")


def shard_of(store, images, number):
    (path,) = store.glob(f"{images}-*/{number:06d}-*.safetensors")
    return path


def failed_among(done):
    """A process that failed; the others did too, or were terminated and say why."""
    failed = [d for d in done if d.status == 1]
    assert {d.status for d in done} <= {1, -signal.SIGTERM}
    return failed[0]


def assert_one_sentence(done, *said):
    assert done.status == 1
    assert done.err.startswith("fusenorm: ")
    assert done.err.count("\n") == 1, done.err
    for words in said:
        assert words in done.err


def kill_at_random_moments(short, home, world, moments, chance):
    """Kill one process at each moment, and let the others end; the status of each is returned."""
    ends = []
    for _ in range(moments):
        argv = short.argv("eval", home / "store")
        running = [start(home, argv, rank, world, shard=8) for rank in range(world)]
        victim = running[chance.randrange(world)]
        some = len(log_of(home)) + chance.randrange(20)
        while len(log_of(home)) < some and victim.process.is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.03))
        with suppress(ProcessLookupError):  # it was faster
            os.kill(victim.process.pid, signal.SIGKILL)
        ends.append([done.status for done in ended(running)])
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_processes_killed_at_any_moment_lose_no_shard(short, table, tmp_path, world):
    ends = kill_at_random_moments(short, tmp_path, world, 3, random.Random(world))
    assert all(-signal.SIGKILL in statuses or statuses == [0] * world for statuses in ends)
    done = run(tmp_path, short.argv("eval", tmp_path / "store"), world, shard=8)
    assert [d.status for d in done] == [0] * world, done
    assert done[0].out == table
    assert scored_twice(log_of(tmp_path)) == []
    assert not any(verify(tmp_path / "store").values())


def cut(path, store):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path, store):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path, store):
    shutil.copy(shard_of(store, "test_noise", 0), path)


def misname(path, store):
    path.rename(path.with_name(f"{path.name[:7]}{0:016x}.safetensors"))


OTHER_DAMAGE = [(cut, 1), (swap, 1), (misname, 2)]


@pytest.mark.parametrize(
    ("damage", "world"),
    [(flip, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_DAMAGE)],
)
def test_a_damaged_shard_is_reported_and_computed_again(
    short, table, store, tmp_path, damage, world
):
    damage(shard_of(store, "test_china", 1), store)
    done = run(tmp_path, short.argv("eval", store), world, shard=8)
    assert [d.status for d in done] == [0] * world, done
    assert done[0].out == table
    said = [line for d in done for line in d.err.splitlines() if "computed again" in line]
    assert len(said) == 1
    assert "000001-" in said[0]
    assert [(kind, number) for kind, _, number in log_of(tmp_path)] == [
        ("loaded", "1"), ("written", "1"),
    ]  # fmt: skip
    assert not any(verify(store).values())


def test_a_damaged_structure_is_understood_again(short, table, store, tmp_path):
    flip(shard_of(store, "network", 0), store)
    (done,) = run(tmp_path, short.argv("eval", store), shard=8)
    assert (done.status, done.out, done.err) == (0, table, "")
    argv = short.argv("eval", store)
    (done,) = run(tmp_path, argv, shard=8, first=without_network_and_images)
    assert (done.status, done.out) == (0, table)


def impatient():
    loading.OWNER_TIME = 0.1


def test_a_damaged_shard_of_a_process_that_is_past_it_is_computed_by_another(
    short, store, tmp_path
):
    flip(shard_of(store, "test_china", 2), store)
    running = start(tmp_path, short.argv("eval", store), 1, 2, shard=8, first=impatient)
    assert running.done().status == 0


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_whose_peers_are_done_waits_for_none(short, whole, store, tmp_path, rank):
    loaded = [words for kind, *words in log_of(whole) if kind == "loaded"]
    fit = [words for words in loaded if words[0].startswith("val_")]
    tested = [words for words in loaded if words not in fit]  # these are dealt out as one set
    for name, number in (*fit[rank::2], *tested[rank::2]):
        (path,) = (store / name).glob(f"{int(number):06d}-*.safetensors")
        path.unlink()
    running = start(tmp_path, short.argv("eval", store), rank, 2, shard=8)
    assert running.done().status == 0


def test_a_process_goes_on_when_another_run_has_computed_more(short, store, tmp_path):
    """It waits for scores without features, of which the other run has those with features."""
    argv = [*short.argv("eval", tmp_path / "new"), "--set", "strong=[output]"]
    waiting = start(tmp_path / "waiting", argv, 1, 2, shard=8)
    while not any(kind == "written" for kind, *_ in log_of(tmp_path / "waiting")):
        time.sleep(0.05)
    (other,) = run(tmp_path / "other", short.argv("eval", tmp_path / "new"), shard=8)
    assert other.status == 0
    assert waiting.done().status == 0


@pytest.mark.slow
def test_several_processes_write_the_digits_once(short, tmp_path):
    argv = short._replace(data=tmp_path / "data").argv("eval", tmp_path / "store", "--validation")
    done = run(tmp_path, argv, 3)
    assert [d.status for d in done] == [0, 0, 0], done
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "benchmark_imglist", "images_digits",
    ]  # fmt: skip
