"""Commands in processes of their own, forked from one that has imported everything."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from fusenorm_openood.cli.main import main
from fusenorm_openood.deployment import files as sharded
from fusenorm_openood.forward import recorded
from fusenorm_openood.storage.shards import ShardSet
from fusenorm_openood.storage.torchrun import PATIENCE

CONTEXT = get_context("forkserver")
# What commands import late: each process would take seconds for it.
LATE = ["torchvision.transforms", "fusenorm_openood.kernels.cpu"]
CONTEXT.set_forkserver_preload([__name__, "fusenorm_openood.cli.eval", *LATE])
LOST = 300 * PATIENCE  # seconds after which a process counts as waiting for ever


class Done(NamedTuple):
    """How a process ended: its exit status, negative for a signal, and what it printed."""

    status: int
    out: str
    err: str


class Running(NamedTuple):
    """A process that runs a command."""

    process: BaseProcess
    printed: Path

    def done(self) -> Done:
        self.process.join(LOST)
        assert self.process.exitcode is not None, f"still waiting: {self._text('err')}"
        return Done(self.process.exitcode, self._text("out"), self._text("err"))

    def _text(self, stream: str) -> str:
        path = self.printed.with_suffix(f".{stream}")
        return path.read_text() if path.exists() else ""  # killed at its very start


def start(
    home: Path,
    argv: Sequence[object],
    rank: int = 0,
    world: int = 1,
    shard: int = 40,
    first: Callable[[], object] | None = None,
) -> Running:
    """Start a command as one of the processes that `torchrun` would start.

    Args:
        home: folder for what it prints, and for `log.txt`; see `logged`.
        argv: the arguments of `fusenorm`.
        rank, world: this process, and how many there are.
        shard: images per shard.
        first: called in the process before the command.
    """
    home.mkdir(exist_ok=True)
    printed = home / f"printed{rank}"
    arguments = printed, [str(a) for a in argv], rank, world, shard, first
    process = CONTEXT.Process(target=_command, args=arguments)
    process.start()
    return Running(process, printed)


def run(home: Path, argv: Sequence[object], world: int = 1, **how) -> list[Done]:
    """Run a command in several processes, as `torchrun` does: if one fails, the others end."""
    running = [start(home, argv, rank, world, **how) for rank in range(world)]
    return ended(running)


def ended(running: Sequence[Running]) -> list[Done]:
    """Wait for processes; when one fails, terminate the others, as `torchrun` does."""
    end = time.monotonic() + LOST
    while any(r.process.exitcode is None for r in running) and time.monotonic() < end:
        if any(r.process.exitcode for r in running):
            for r in running:
                with suppress(ProcessLookupError):
                    r.process.terminate()
            break
        time.sleep(0.01)
    return [r.done() for r in running]


def log_of(home: Path) -> list[tuple[str, ...]]:
    """What `_log` has logged, in order."""
    path = home / "log.txt"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def scored_twice(log: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The images that were loaded for a shard which was in the store already."""
    written, again = set(), []
    for kind, name, *numbers in log:
        if kind == "written":
            written.add((name, numbers[0]))
        elif kind == "loaded" and (name, numbers[0]) in written:
            again.append((name, *numbers))
    return again


def failed_among(done: Sequence[Done]) -> Done:
    """A process that failed; the others did too, or were terminated and say why."""
    assert {d.status for d in done} <= {1, -signal.SIGTERM}
    return next(d for d in done if d.status == 1)


def assert_one_sentence(done: Done, *said: str) -> None:
    assert done.status == 1
    assert done.err.startswith("fusenorm: ")
    assert done.err.count("\n") == 1, done.err
    for words in said:
        assert words in done.err


def _command(printed, argv, rank, world, shard, first):
    for number, stream in ((1, "out"), (2, "err")):
        opened = os.open(printed.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["TORCHELASTIC_RUN_ID"] = str(printed.parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    recorded.SHARD = sharded.SHARD = shard
    _log(printed.with_name("log.txt"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # There are always too few images here, which one of the sentences would say.
    sys.warnoptions.append("ignore")
    warnings.simplefilter("ignore")
    if first is not None:
        first()
    sys.exit(main(argv))


def _log(path: Path) -> None:
    """Log every batch of images that is loaded for a shard, and every shard that is written."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write = ShardSet.write

    def written(self, number, columns):
        found = write(self, number, columns)
        os.write(log, f"written {self.folder.name} {number}\n".encode())
        return found

    ShardSet.write = written
    for module in (recorded, sharded):
        module.shard_batches = _logging(module.shard_batches, log)


def _logging(shard_batches, log):
    def each(shards, numbers, load, batch_size):
        for number, batches in shard_batches(shards, numbers, load, batch_size):
            os.write(log, f"loaded {shards.folder.name} {number}\n".encode())
            yield number, batches

    return each
