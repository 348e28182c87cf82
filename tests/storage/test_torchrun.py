"""Processes of `torchrun`: their shares, their waits, and what they say when one of them fails."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.network import ResNet18_32x32
from fusenorm_openood.storage import torchrun
from fusenorm_openood.storage.torchrun import Process, among_peers, this_process, wait_until

PAIR = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """This process is the second of two, which meet in a folder of the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in PAIR.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "2", "RANK": "0"},  # of a cluster's job without torchrun
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"RANK": "3"},
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""},
        {"WORLD_SIZE": " ", "RANK": "1", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    ],
)
def test_what_is_left_in_the_environment_makes_no_process(left, monkeypatch):
    for name in PAIR:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process(0, 0, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "2"}, {"RANK": "-1"}, {"RANK": "x"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "9"}],
)
def test_numbers_that_no_launcher_gives_are_one_sentence(pair, wrong, monkeypatch):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"below WORLD_SIZE, got .*: start with torchrun"):
        this_process()


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_meeting_folder_of_somebody_else_is_not_used(pair, kind):
    from fusenorm_openood.storage.torchrun import _meeting_place

    elsewhere, place = pair / "elsewhere", _meeting_place()
    elsewhere.mkdir(mode=0o700)
    own = elsewhere / "1"  # of this rank's name, but not its file
    own.write_text("mine")
    if kind == "link":
        place.symlink_to(elsewhere)
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    with among_peers():
        assert {*pair.glob("*/1")} <= {own, place / "1"}
    assert own.read_text() == "mine"


def test_the_meeting_folder_is_private(pair):
    with among_peers():
        (folder,) = pair.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_all_of_the_work_and_none_of_it_twice(world):
    for numbers in ([], [0], [5], range(7), [1, 3, 5, 7]):
        shares = [Process(rank, rank, world).share(numbers) for rank in range(world)]
        assert sorted(number for share in shares for number in share) == list(numbers)


class Clock:
    """A clock that only sleeping moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_wait_ends_with_what_was_found_or_when_its_time_is_over(monkeypatch):
    clock, answers = Clock(), iter([None, [], [3]])
    monkeypatch.setattr(torchrun, "time", clock)
    assert wait_until(lambda: next(answers)) == [3]
    begun = clock.now
    assert not wait_until(lambda: False, 9.0)
    assert 9.0 <= clock.now - begun < 9.0 + torchrun.PATIENCE


def test_peers_print_nothing_and_leave_nothing_behind(pair, capsys):
    terminated = signal.getsignal(signal.SIGTERM)
    with among_peers() as process:
        print("twice")
        assert process == Process(1, 1, 2)
        assert [file.name for file in pair.rglob("1")] == ["1"]
    print("once")
    assert capsys.readouterr().out == "once\n"
    assert list(pair.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == terminated


def test_a_thread_may_be_among_peers(pair):
    found = []

    def work():
        with among_peers() as process:
            found.append(process)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [Process(1, 1, 2)]


@pytest.mark.parametrize("failed", ["0", "5"])
def test_only_a_process_of_the_same_run_is_named(tmp_path, failed):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = f"""
import os, signal, sys
from fusenorm_openood.storage.torchrun import among_peers, _meeting_place
with among_peers():
    (_meeting_place() / "{failed}").write_text("{gone.pid}")
    os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, **PAIR, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    why = "stops because process 0 ended" if failed == "0" else "was terminated"
    assert done.stderr == (
        f"fusenorm: process 1 of 2 {why}; finished shards are kept: start the command again to go "
        "on\n"
    )


WAITING = """
import sys, time
from fusenorm_openood.storage.torchrun import among_peers
with among_peers():
    print("here", file=sys.stderr, flush=True)
    time.sleep(60)
"""
EARLIER = f"""
import os, subprocess, sys
run = subprocess.Popen([sys.executable, "-c", '''{WAITING}'''], stderr=subprocess.PIPE)
run.stderr.readline()
run.kill()
run.wait()
"""


def test_a_process_of_an_earlier_run_of_the_same_name_is_not_named(tmp_path):
    environment = {**os.environ, **PAIR, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", EARLIER]
    subprocess.run(command, env={**environment, "RANK": "0", "LOCAL_RANK": "0"}, check=True)
    assert len([*tmp_path.glob("fusenorm-*/0")]) == 1
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        run.stderr.readline()
        run.terminate()
        assert "process 1 of 2 was terminated" in run.stderr.read()


def test_a_process_says_why_it_ends_also_in_the_middle_of_a_print(tmp_path):
    code = """
import os, signal, sys
from fusenorm_openood.storage.torchrun import among_peers

class Busy:
    def write(self, text):
        raise RuntimeError("reentrant call")

with among_peers():
    sys.stderr = Busy()
    os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, **PAIR, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.startswith("fusenorm: process 1 of 2 was terminated")


def built(num_classes):
    """The digits network; the first process leaves its number and waits for ever."""
    (Path(os.environ["MARKS"]) / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "0":
        signal.pause()
    return ResNet18_32x32(num_classes, width=16)


def test_a_killed_process_ends_the_others_of_torchrun_which_name_it(digits, tmp_path):
    data, checkpoint = digits
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "fusenorm_openood.cli", "eval", "--root", str(checkpoint)]
    command += ["--id-data", "digits", "--data-root", str(data), "--store", str(tmp_path / "store")]
    command += ["--num-workers", "0", "--no-progress", "--device", "cpu"]
    command += ["--network", f"{__name__}:built"]
    marks = tmp_path / "marks"
    marks.mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["MARKS"] = str(marks)
    begun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all((marks / rank).exists() for rank in "01") or begun.poll() is not None)
    first = wait_until((marks / "0").read_text)  # until it is written
    os.kill(int(first), signal.SIGKILL)  # the other one waits for its shards
    _, said = begun.communicate()
    assert begun.returncode != 0
    assert "fusenorm: process 1 of 2 stops because process 0 ended; finished shards" in said
