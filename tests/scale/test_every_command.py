"""What interrupts `eval` or `score` is one sentence, and the next run gives the result."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.deployment.files import ImageFiles, ReadableFiles
from fusenorm_openood.storage.maintenance import verify
from fusenorm_openood.storage.shards import ShardSet
from tests.scale.commands import (
    assert_one_sentence,
    ended,
    failed_among,
    log_of,
    run,
    scored_twice,
    start,
)


class Command(NamedTuple):
    """A command whose images are all in one folder."""

    argv: Callable[..., list]
    images: Path

    def runs(self, home: Path, store: Path, world: int = 1, **how) -> str:
        """What a run that succeeds prints."""
        done = run(home, self.argv(store), world, shard=8, **how)
        assert [d.status for d in done] == [0] * world, done
        return done[0].out


@pytest.fixture(
    scope="module",
    params=["score", pytest.param("eval", marks=pytest.mark.slow)],
)
def command(request, short, detector, tmp_path_factory) -> Command:
    home = tmp_path_factory.mktemp("command")
    images = home / "data" / "images_digits"
    shutil.copytree(short.data / "benchmark_imglist", home / "data" / "benchmark_imglist")
    images.mkdir()
    for folder in (short.data / "images_digits").iterdir():
        (images / folder.name).symlink_to(folder)
    own = images / "test_flower"
    own.unlink()
    own.mkdir()
    for path in sorted((short.data / "images_digits" / "test_flower").iterdir())[:30]:
        shutil.copy2(path, own)
    quick = ["--num-workers", 0, "--no-progress", "--device", "cpu"]
    if request.param == "eval":
        known = short._replace(data=home / "data")
        return Command(lambda store: known.argv("eval", store), own)
    argv = ["score", "--detector", detector, own, *quick, "--store"]
    return Command(lambda store: [*argv, store], own)


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory) -> tuple[str, Path]:
    """What an uninterrupted run prints, and its store."""
    home = tmp_path_factory.mktemp("uninterrupted")
    return command.runs(home, home / "store"), home / "store"


@pytest.fixture
def expected(uninterrupted) -> str:
    return uninterrupted[0]


@pytest.fixture
def whole_store(uninterrupted, tmp_path) -> Path:
    """A copy of the store of the uninterrupted run."""
    return shutil.copytree(uninterrupted[1], tmp_path / "store")


def remove_shard(store: Path, number: int) -> None:
    """Remove a shard of the images of `Command.images`."""
    (path,) = [
        path
        for name in ("test_flower", "files")
        for path in store.glob(f"{name}-*/{number:06d}-*.safetensors")
    ]
    path.unlink()


def loader_ends():
    """Let loader processes end at the tenth image of a set."""
    torch.multiprocessing.set_start_method("fork", force=True)  # else they know nothing of this
    for images in (ImageList, ImageFiles, ReadableFiles):
        images.__getitem__ = _ending(images.__getitem__)


def _ending(read):
    def reading(self, number):
        if number == 9 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, number)

    return reading


def test_a_loader_process_that_is_killed_is_one_sentence(command, expected, tmp_path):
    home, store = tmp_path / "home", tmp_path / "store"
    argv = [*command.argv(store), "--num-workers", 1]
    (done,) = run(home, argv, shard=8, first=loader_ends)
    assert_one_sentence(done, "a loader process ended", "finished shards", "--num-workers")
    assert command.runs(home, store) == expected
    assert scored_twice(log_of(home)) == []


def full_disk(size: int = 500):
    """Let no file be larger than so many bytes, and print nothing: that is a file as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_one_sentence(command, expected, whole_store, tmp_path):
    home, store = tmp_path / "home", whole_store
    remove_shard(store, 1)
    done = run(home, command.argv(store), 2, shard=8, first=full_disk)
    assert_one_sentence(failed_among(done), "shard 1 cannot be written", "free disk space")
    assert list(store.rglob("*.tmp")) == []
    assert command.runs(home, store) == expected
    assert [kind for kind, *_ in log_of(home)] == ["loaded"] * 2 + ["written"]


def test_a_full_disk_under_the_rows_is_one_sentence(short, detector, tmp_path):
    argv = ["score", "--detector", detector, short.data / "images_digits" / "test_digit8"]
    argv += ["--num-workers", 0, "--no-progress", "--device", "cpu", "--csv", tmp_path / "x.csv"]
    argv += ["--store", tmp_path / "store"]
    (done,) = run(tmp_path / "home", argv, shard=8, first=partial(full_disk, 4000))
    assert_one_sentence(done, "x.csv cannot be written", "--resume unless there is a --store")
    (done,) = run(tmp_path / "home", argv, shard=8)
    assert done.status == 0
    assert (tmp_path / "x.csv").read_text().count("\n") == 175


@pytest.mark.parametrize("where", ["file", "/proc/nowhere"])
def test_a_store_that_cannot_be_a_folder_is_one_sentence(command, tmp_path, where):
    (tmp_path / "file").touch()
    (done,) = run(tmp_path / "home", command.argv(tmp_path / where))
    assert_one_sentence(done, str(tmp_path / where), "choose another store")


def process_1_stops(mark: Path):
    """Let process 1 stop before it writes its first shard."""
    write = ShardSet.write

    def stopping(self, number, columns):
        if os.environ["RANK"] == "1":
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(self, number, columns)

    ShardSet.write = stopping


def test_what_a_killed_process_lacks_is_computed_by_the_next_run(command, expected, tmp_path):
    home, store, mark = tmp_path / "home", tmp_path / "store", tmp_path / "stopped"
    stops = partial(process_1_stops, mark)
    running = [start(home, command.argv(store), rank, 2, shard=8, first=stops) for rank in range(2)]
    while not mark.exists() or len([k for k, *_ in log_of(home) if k == "written"]) < 2:
        time.sleep(0.01)
    os.kill(running[1].process.pid, signal.SIGKILL)
    other, killed = ended(running)
    assert killed.status == -signal.SIGKILL
    assert other.status == -signal.SIGTERM
    assert command.runs(home, store, 2) == expected
    assert scored_twice(log_of(home)) == []


def test_two_runs_at_once_share_a_store(command, expected, tmp_path):
    argv = command.argv(tmp_path / "store")
    running = [start(tmp_path / str(number), argv, shard=8) for number in range(2)]
    done = [r.done() for r in running]
    assert [d.status for d in done] == [0, 0], done
    assert [d.out for d in done] == [expected] * 2
    assert not any(verify(tmp_path / "store").values())
