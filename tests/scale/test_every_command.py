"""What interrupts `eval`, `fit` or `score` is one sentence, and the next run gives the result."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.deployment.files import ImageFiles, ReadableFiles
from fusenorm_openood.storage.maintenance import verify
from fusenorm_openood.storage.shards import ShardSet
from tests.scale.commands import Done, ended, log_of, run, scored_twice, start
from tests.scale.test_failures import assert_one_sentence, failed_among
from tests.scale.test_processes import agree

DAY = 24 * 60 * 60


class Command(NamedTuple):
    """A command whose images are all in one folder, and what it makes of them."""

    argv: Callable[..., list]
    result: Callable[[Done], object]
    images: Path

    def runs(self, home: Path, store: Path, world: int = 1, **how) -> object:
        """What a run that succeeds makes."""
        done = run(home, self.argv(store), world, shard=8, **how)
        assert [d.status for d in done] == [0] * world, done
        return self.result(done[0])


@pytest.fixture(
    scope="module",
    params=["score", *(pytest.param(c, marks=pytest.mark.slow) for c in ("eval", "fit"))],
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
        return Command(lambda store: known.argv("eval", store), lambda done: done.out, own)
    if request.param == "score":
        argv = ["score", "--detector", detector, own, *quick, "--store"]
        return Command(lambda store: [*argv, store], lambda done: done.out, own)
    out = home / "out" / "d.st"
    argv = ["fit", "--weights", short.checkpoint, "--id-dir", own, "--image-size", 24]
    argv += ["--normalization", "digits", *quick, "--output", out, "--store"]
    return Command(lambda store: [*argv, store], lambda done: out.read_bytes(), own)


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory) -> tuple[object, Path]:
    """What an uninterrupted run makes, and its store."""
    home = tmp_path_factory.mktemp("uninterrupted")
    return command.runs(home, home / "store"), home / "store"


@pytest.fixture
def expected(uninterrupted) -> object:
    return uninterrupted[0]


@pytest.fixture
def whole_store(uninterrupted, tmp_path) -> Path:
    """A copy of the store of the uninterrupted run."""
    return shutil.copytree(uninterrupted[1], tmp_path / "store")


def remove_shard(store: Path, number: int) -> None:
    """Remove a shard of the images of `Command.images`."""
    (path,) = [
        path
        for name in ("test_flower", "fit", "files")
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


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_full_disk_is_one_sentence(command, expected, whole_store, tmp_path, world):
    home, store = tmp_path / "home", whole_store
    remove_shard(store, 1)
    done = run(home, command.argv(store), world, shard=8, first=full_disk)
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


@contextmanager
def read_only(folder: Path):
    """Context in which nobody, not even root, can write to a folder."""
    if os.geteuid():
        for path in (folder, *folder.glob("*/")):
            path.chmod(0o555)
        yield
        return
    for options in (["--bind"], ["-o", "remount,bind,ro"]):
        done = subprocess.run(["mount", *options, folder, folder], capture_output=True)
        if done.returncode:
            pytest.skip("root cannot mount, and no other folder is read-only for root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_complete_store_may_be_read_only_and_another_is_one_sentence(
    command, expected, whole_store, tmp_path
):
    home, store = tmp_path / "home", whole_store
    with read_only(store):
        assert command.runs(home, store) == expected
    remove_shard(store, 1)
    with read_only(store):
        (done,) = run(home, command.argv(store), shard=8)
        assert_one_sentence(done, "shard 1 cannot be written", "choose another store")


@pytest.mark.parametrize("where", ["file", "/proc/nowhere"])
def test_a_store_that_cannot_be_a_folder_is_one_sentence(command, tmp_path, where):
    (tmp_path / "file").touch()
    (done,) = run(tmp_path / "home", command.argv(tmp_path / where))
    assert_one_sentence(done, str(tmp_path / where), "choose another store")


def vanishing(image: Path):
    """Let an image vanish while an earlier one of its set is read."""
    for images in (ImageList, ImageFiles, ReadableFiles):
        images.__getitem__ = _vanishing(images.__getitem__, image)


def _vanishing(read, image):
    def reading(self, number):
        if number == 9:
            image.unlink(missing_ok=True)
        return read(self, number)

    return reading


def test_an_image_that_vanishes_loses_no_shard(command, expected, tmp_path):
    home, store = tmp_path / "home", tmp_path / "store"
    image = command.images / "0012.png"
    shutil.copy2(image, tmp_path)
    (done,) = run(home, command.argv(store), shard=8, first=partial(vanishing, image))
    if "score" in command.argv(store):  # it is one row of 30
        assert done.status == 3
        (row,) = [line for line in done.out.splitlines() if "0012.png" in line]
        assert "cannot be read" in row
    else:
        assert_one_sentence(done, "0012.png", "cannot be read")
    shutil.copy2(tmp_path / "0012.png", image)
    result = command.runs(home, store)
    assert result == expected or agree(result, expected)  # it is scored in a batch of its own
    assert scored_twice(log_of(home)) == []


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
    assert [command.result(d) for d in done] == [expected] * 2
    assert not any(verify(tmp_path / "store").values())


def clock_of_one(days: int):
    """Let the clock of process 1 be wrong, also that of its files."""
    if os.environ["RANK"] == "1":
        clock, replace = time.time, Path.replace
        time.time = lambda: clock() + days * DAY

        def replaced(self, target):
            os.utime(self, (time.time(),) * 2)
            return replace(self, target)

        Path.replace = replaced


@pytest.mark.parametrize("days", [-400, pytest.param(400, marks=pytest.mark.slow)])
def test_a_clock_that_is_wrong_changes_nothing(command, expected, tmp_path, days):
    home, store = tmp_path / "home", tmp_path / "store"
    assert command.runs(home, store, 2, first=partial(clock_of_one, days)) == expected
    written = [line for line in log_of(home) if line[0] == "written"]
    assert len(written) == len(set(written))
    times = [path.stat().st_mtime - time.time() for path in store.rglob("*.safetensors")]
    assert any(abs(seconds - days * DAY) < DAY / 2 for seconds in times)
    before = log_of(home)
    assert command.runs(home, store, 2) == expected
    assert log_of(home) == before


def clock_that_jumps(days: int):
    """Let the clock jump to and fro whenever it is asked."""
    clock, asked = time.time, iter(range(10**9))
    time.time = lambda: clock() + (next(asked) % 2) * days * DAY


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(command, expected, tmp_path):
    home = tmp_path / "home"
    jumps = partial(clock_that_jumps, 1)
    assert command.runs(home, tmp_path / "store", 2, first=jumps) == expected
    assert scored_twice(log_of(home)) == []
