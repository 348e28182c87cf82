"""The processes that PyTorch's `torchrun` started together, and which one this is.

Processes that score images meet in the files that they write. None of them waits in a collective,
so none can hang in one; when one fails, `torchrun` says which, and terminates the others.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NamedTuple, TypeVar

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

    def share(self, numbers: Iterable[int], start: int = 0) -> list[int]:
        """Those numbered units of work that are this process's, if `start` others come before."""
        return [number for number in numbers if (start + number) % self.world == self.rank]


def this_process() -> Process:
    """This process by the environment of `torchrun`; the only one without it.

    `torchrun` sets LOCAL_RANK, too. A cluster or a notebook may set or leave the others.
    ConfigError for numbers that no launcher gives.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: os.environ.get(name, "").strip() for name in names}
    if not (given["LOCAL_RANK"] and given["WORLD_SIZE"]):
        return Process()
    try:
        process = Process(*(int(number or 0) for number in given.values()))
    except ValueError:
        process = Process(-1)
    if not (0 <= process.rank < process.world and 0 <= process.local_rank < process.world):
        found = ", ".join(f"{name}={number}" for name, number in given.items())
        raise ConfigError(
            f"RANK and LOCAL_RANK must be numbers below WORLD_SIZE, got {found}: start with "
            "torchrun, or unset them"
        )
    return process


def wait_until(find: Callable[[], Found], at_most: float = math.inf) -> Found:
    """Call `find` ever less often until it returns something true, for so many seconds at most.

    Returns what `find` returned last.
    """
    pause, end = 0.01, time.monotonic() + at_most
    while not (found := find()) and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, PATIENCE)
    return found


@contextmanager
def among_peers() -> Iterator[Process]:
    """Context of one of several processes: only the first one prints to standard output."""
    process = this_process()
    if process.leads:
        yield process
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield process
