"""Kill processes at random moments, start again, and check that nothing but time was lost.

    python benchmarks/interruptions.py [--moments 50] [--seed 0] [--only process torchrun ray]

The moments are spread over `fusenorm eval` in one process, `fusenorm eval` in two processes of
`torchrun`, one of which is killed, and `fusenorm score --engine ray` with two actors, one of which
is killed, or about every fourth time the driver. If the run ends, the same command is run again. It
must give the bytes of an undisturbed run, and begin no shard that was written.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fusenorm_openood.cli import eval as _eval  # noqa: F401
from fusenorm_openood.cli import fit as _fit  # noqa: F401
from fusenorm_openood.cli import score
from fusenorm_openood.cli.main import main as fusenorm
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.deployment import files as sharded
from fusenorm_openood.deployment import ray as actors
from fusenorm_openood.forward import recorded
from fusenorm_openood.network import ResNet18_32x32
from fusenorm_openood.storage.shards import ShardSet

KINDS = ("process", "torchrun", "ray")
SHARD = 8  # images
FORK = get_context("fork")
PATIENCE = 60.0  # seconds that the other processes have to end


class Log:
    """A file with lines `PID loaded` and `PID begun|written SET NUMBER`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, *words: object) -> None:
        with self.path.open("a") as file:
            file.write(" ".join(map(str, (os.getpid(), *words))) + "\n")

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]

    def scored_twice(self) -> int:
        """How many shards were begun although they had been written."""
        written, again = set(), 0
        for _, kind, *shard in self.lines():
            again += kind == "begun" and tuple(shard) in written
            written |= {tuple(shard)} if kind == "written" else set()
        return again

    def follow(self) -> None:
        """Log what this process does from now on."""
        write, scored, load_batches = ShardSet.write, sharded.scored, recorded.shard_batches

        def logged_write(shards: ShardSet, number: int, columns: Any) -> Any:
            path = write(shards, number, columns)
            self.say("written", shards.folder.name.partition("-")[0], number)
            return path

        def logged_batches(shards: ShardSet, *how: Any) -> Iterator[Any]:
            for number, batches in load_batches(shards, *how):
                self.say("begun", shards.folder.name.partition("-")[0], number)
                yield number, batches

        def logged_scored(detector: Any, loader: Any) -> Any:
            self.say("begun", "files", int(loader.dataset.paths[0].stem) // SHARD)
            return scored(detector, loader)

        ShardSet.write = logged_write  # type: ignore[method-assign]
        recorded.shard_batches, actors.scored = logged_batches, logged_scored
        recorded.SHARD = sharded.SHARD = SHARD


class Loading:
    """Loads the detector in an actor, which logs from then on."""

    def __init__(self, log: Log) -> None:
        self.log, self.load = log, score.inputs.load_detector

    def __call__(self, *args: Any) -> Any:
        if "ray" in sys.modules and sys.modules["ray"].get_runtime_context().get_actor_id():
            self.log.follow()
            self.log.say("loaded")
        return self.load(*args)


class Home(NamedTuple):
    """A folder with all files of one command, which may be interrupted."""

    folder: Path
    argv: list[str]

    @property
    def log(self) -> Log:
        return Log(self.folder / "log")

    def said(self) -> str:
        return (self.folder / "err").read_text()

    def start(self, run: Callable[["Home"], None]) -> BaseProcess:
        self.log.path.touch()
        process = FORK.Process(target=self._run, args=(run,))
        process.start()
        return process

    def _run(self, run: Callable[["Home"], None]) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        tempfile.tempdir = str(self.folder)
        torch.set_num_threads(1)
        run(self)


def alone(home: Home) -> None:
    home.log.follow()
    score.inputs.load_detector = Loading(home.log)  # type: ignore[assignment]
    sys.exit(fusenorm(home.argv))


def under_torchrun(home: Home) -> None:
    """What `torchrun --standalone --nproc-per-node 2` does, with forks of this process."""
    meet = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": home.folder.name}
    how = LaunchConfig(1, 1, 2, max_restarts=0, start_method="fork", **meet)
    elastic_launch(how, alone)(home)


def moment(home: Home, run: BaseProcess, after: int, ready: Callable[[], bool]) -> None:
    """Wait until so many lines are logged."""
    while run.is_alive() and not (ready() and len(home.log.lines()) >= after):
        time.sleep(0.002)


def interrupted(home: Home, kind: str, lines: int, chance: random.Random) -> Counter[str]:
    """Kill a process of a run at a random moment, and let the others end."""
    run = home.start(under_torchrun if kind == "torchrun" else alone)
    whom = chance.randrange(4)

    def pids() -> list[int]:
        """The processes of which one is killed, as far as they have begun."""
        if kind == "torchrun":
            return [int(f.read_text() or 0) for f in sorted(home.folder.glob("fusenorm-*/[01]"))]
        if kind == "ray" and whom:
            return [int(pid) for pid, what, *_ in home.log.lines() if what == "loaded"]
        return [run.pid or 0]

    wanted = 2 if kind == "torchrun" else 1
    moment(home, run, chance.randrange(lines), lambda: len(pids()) >= wanted and 0 not in pids())
    time.sleep(chance.uniform(0, 0.03))
    victim = whom % max(len(pids()), 1)
    found = Counter[str](moments=1)
    alive = run.is_alive()
    with suppress(ProcessLookupError, IndexError):
        os.kill(pids()[victim], signal.SIGKILL)
        found["killed"] += alive
    killed = time.monotonic()
    run.join(600 if kind == "ray" else PATIENCE)
    check(not run.is_alive(), home, f"others still run {PATIENCE:g} s later")
    if kind == "torchrun" and run.exitcode:
        found["named"] += (
            f"process {1 - victim} of 2 stops because process {victim} ended" in home.said()
        )
        found["slowest"] = round(time.monotonic() - killed + 0.5)
    if kind == "ray":
        found["drivers"] += bool(run.exitcode)
        found["survived"] += not run.exitcode
        check(run.exitcode in ((0,) if whom else (0, -signal.SIGKILL)), home, "the run has failed")
    return found


def check(fine: bool, home: Home, wrong: str) -> None:
    if not fine:
        sys.exit(f"{home.folder}: {wrong}\n{home.said()}")


def measure(
    kind: str, moments: int, seed: int, work: Path, argv: Callable[[Path], list[str]]
) -> str:
    """What so many interruptions of one kind come to."""

    def home(name: str) -> Home:
        folder = work / f"{kind}-{name}"
        folder.mkdir()
        return Home(folder, argv(folder))

    def result(one: Home, done: bool = False) -> bytes:
        if not done:
            run = one.start(under_torchrun if kind == "torchrun" else alone)
            run.join()
            check(run.exitcode == 0, one, "a run without interruption has failed")
        csv = one.folder / "out.csv"
        return csv.read_bytes() if csv.exists() else (one.folder / "out").read_bytes()

    begun = time.monotonic()
    undisturbed = home("undisturbed")
    expected, lines = result(undisturbed), len(undisturbed.log.lines())
    check(len(expected) > 100, undisturbed, "it has no result")
    chance, found = random.Random(f"{kind} {seed}"), Counter[str]()
    for number in range(moments):
        one = home(str(number))
        now = interrupted(one, kind, lines, chance)
        check(result(one, now["survived"] > 0) == expected, one, "the result is another one")
        check(not one.log.scored_twice(), one, "images were scored twice")
        slowest = max(found["slowest"], now["slowest"])
        found += now
        found["slowest"] = slowest
    said = f"{kind}: {found['killed']} of {moments} killed before their end"
    if kind == "torchrun":
        said += f", {found['named']} named by the other process, which ended within {slowest} s"
    if kind == "ray":
        said += f", {found['drivers']} of them drivers; {found['survived']} went on by themselves"
    seconds = time.monotonic() - begun
    return f"{said}; {moments} equal results, 0 shards scored twice ({seconds:.0f} s)"


def made(work: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Images, a network and a detector; the arguments of each kind's command in a folder."""
    data, run = work / "data", work / "run"
    write_digits(data)
    for path in (data / "benchmark_imglist" / "digits").glob("*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: 70 if "train" in path.name else 30]))
    torch.manual_seed(0)
    (run / "s0").mkdir(parents=True)
    torch.save(ResNet18_32x32(num_classes=7).state_dict(), run / "s0" / "best.ckpt")
    images, quick = (
        data / "images_digits",
        ["--num-workers", "0", "--no-progress", "--device", "cpu"],
    )
    eval_argv = [
        "eval",
        "--id-data",
        "digits",
        "--root",
        f"{run}",
        "--data-root",
        f"{data}",
        *quick,
    ]
    fit_argv = [
        "fit",
        "--weights",
        f"{run}/s0/best.ckpt",
        "--id-dir",
        f"{images}/val_digits",
        *quick,
    ]
    fit_argv += ["--image-size", "24", "--normalization", "digits", "--output", f"{work}/d.st"]
    score_argv = [
        "score",
        "--engine",
        "ray",
        "--cores-per-actor",
        "1",
        "--detector",
        f"{work}/d.st",
    ]
    score_argv += [f"{images}/test_digit8", "--batch-size", "4", *quick]
    home = Home(work, fit_argv)
    fitting = home.start(alone)
    fitting.join()
    check(fitting.exitcode == 0, home, "fit has failed")
    of_eval: Callable[[Path], list[str]] = lambda folder: [*eval_argv, "--store", f"{folder}/store"]  # noqa: E731
    return {
        "process": of_eval,
        "torchrun": of_eval,
        "ray": lambda folder: [
            *score_argv,
            "--store",
            f"{folder}/store",
            "--csv",
            f"{folder}/out.csv",
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if kind in args.only]
    with tempfile.TemporaryDirectory() as folder:
        argv = made(Path(folder))
        for number, kind in enumerate(kinds):
            moments = len(range(number, args.moments, len(kinds)))
            if kind == "ray" and not find_spec("ray"):
                print(f"ray: SKIPPED, {moments} moments: Ray is not installed", flush=True)
                continue
            print(measure(kind, moments, args.seed, Path(folder), argv[kind]), flush=True)


if __name__ == "__main__":
    main()
