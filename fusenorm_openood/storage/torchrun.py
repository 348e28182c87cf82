"""The processes that PyTorch's `torchrun` started together: which one this is, and its peers.

Processes that score images meet in the files that they write. None of them waits in a collective,
so none can hang in one.
"""

import math
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple, TypeVar

from fusenorm_openood.errors import ConfigError

PATIENCE = 2.0  # longest time in seconds between two looks at the files of the others

Found = TypeVar("Found")


class Process(NamedTuple):
    """This process among those that work together, as numbered by `torchrun`."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is the one that prints and writes tables."""
        return self.rank == 0

    def share(self, numbers: Iterable[int]) -> list[int]:
        """Those of some numbered units of work that are this process's."""
        return [number for number in numbers if number % self.world == self.rank]


def this_process() -> Process:
    """This process by the environment of `torchrun`; the only one without it.

    `torchrun` sets LOCAL_RANK, too. A cluster or a notebook may set or leave the others.

    Raises:
        ConfigError: numbers that no launcher gives.
    """
    given = {
        name: os.environ.get(name, "").strip() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    if not (given["LOCAL_RANK"] and given["WORLD_SIZE"]):
        return Process()
    try:
        process = Process(*(int(number or 0) for number in given.values()))
    except ValueError:
        process = Process(-1)
    if not (0 <= process.rank < process.world and 0 <= process.local_rank < process.world):
        said = ", ".join(f"{name}={number}" for name, number in given.items())
        raise ConfigError(
            f"RANK and LOCAL_RANK must be numbers below WORLD_SIZE, got {said}: start with "
            "torchrun, or unset them"
        )
    return process


def wait_until(find: Callable[[], Found], at_most: float = math.inf) -> Found:
    """Look again and again, ever less often, until another process has done something.

    Args:
        find: what is looked for, false until it is there.
        at_most: seconds after which to give up.

    Returns:
        What was found last.
    """
    pause, end = 0.01, time.monotonic() + at_most
    while not (found := find()) and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, PATIENCE)
    return found


@contextmanager
def among_peers() -> Iterator[Process]:
    """Context of one of several processes: only the first one prints to standard output.

    When another one fails, `torchrun` terminates this one, which then says on standard error which
    one that was, as far as they share a machine, and exits with status 143.
    """
    process = this_process()
    if process.world == 1:
        yield process
        return
    folder = _meeting_place()
    mine = folder / str(process.rank)
    is_private = _is_private(folder)
    if is_private:
        with suppress(OSError):
            mine.write_text(str(os.getpid()))
    with (
        _says_why_it_is_terminated(folder, process),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(sys.stdout if process.leads else nowhere),
    ):
        yield process
    if is_private:  # one that fails leaves its file, so that the others can name it
        with suppress(OSError):
            mine.unlink()
            folder.rmdir()  # the last one


@contextmanager
def _says_why_it_is_terminated(folder: Path, process: Process) -> Iterator[None]:
    def terminated(number: int, frame: Any) -> None:
        gone = " and ".join(map(str, _gone(folder, process)))
        why = f"stops because process {gone} ended" if gone else "was terminated"
        said = (
            f"fusenorm: process {process.rank} of {process.world} {why}; finished shards are kept: "
            "start the command again to go on\n"
        )
        with suppress(OSError):
            os.write(2, said.encode())  # sys.stderr may be in the middle of a print
        os._exit(128 + number)  # other threads may be inside a long computation

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _meeting_place() -> Path:
    """A folder of this machine that only the processes of this run share.

    Runs of the same name and port, one after another, have another parent.
    """
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    run = "-".join([*(os.environ.get(name, "") for name in names), str(os.getppid())])
    safe = "".join(c if c.isalnum() else "_" for c in f"{socket.gethostname()}-{run}")
    return Path(gettempdir()) / f"fusenorm-{safe}"


def _is_private(folder: Path) -> bool:
    """Whether a folder, created if it does not exist, is one that only this user can write to.

    Its name can be guessed, and the folder around it is everybody's.
    """
    with suppress(OSError):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()  # of a link itself
        own = sys.platform == "win32" or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
        return stat.S_ISDIR(found.st_mode) and own
    return False


def _gone(folder: Path, process: Process) -> list[int]:
    """Which other processes of this machine have failed."""
    gone: list[int] = []
    if not _is_private(folder):
        return gone
    for file in sorted(folder.glob("*")):
        with suppress(OSError, ValueError):
            rank, number = int(file.name), int(file.read_text())
            if rank != process.rank and rank < process.world and not _lives(number):
                gone.append(rank)
    return gone


def _lives(number: int) -> bool:
    try:
        status = Path(f"/proc/{number}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"  # torchrun has not waited for it yet
    except FileNotFoundError:
        pass
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not Path("/proc/self").exists()  # /proc, where there is one, knows all that live
