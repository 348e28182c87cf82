"""Time and memory of tasks, measured side by side."""

import gc
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

Task = Callable[[], Any]
# Slow imports, if installed; processes forked from the server already have them.
PRELOAD = ["torch", "numba", "sklearn.metrics", "openood.postprocessors", "pytorch_ood.detector"]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler


class Prepared(NamedTuple):
    """A task, and the seconds that its preparation took."""

    task: Task
    prepared_s: float = 0.0


class Isolated:
    """Tasks, each in its own process that does nothing else.

    How long a process takes to allocate large tensors depends on what it did before: within one
    process, the same forward pass took 1.0 or 1.5 seconds, depending on what else ran there.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Prepared]], device: torch.device) -> None:
        """Prepare the tasks one after another; `makers` are pickled."""
        self._device = device
        self._pipes: dict[str, Connection] = {}
        self.prepared_s: dict[str, float] = {}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        for name, make in makers.items():
            self._pipes[name], theirs = context.Pipe()
            arguments = (theirs, make, torch.get_num_threads())
            context.Process(target=_serve, args=arguments).start()
            theirs.close()
            self.prepared_s[name] = self._pipes[name].recv()

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes.values():
            pipe.close()

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """As `seconds`, with every task in its own process."""
        return interleaved({name: partial(self._ask, name, once) for name in self._pipes}, rounds)

    def peak_mebibytes(self, name: str) -> float:
        """Peak memory of the tensors of one task; see `peak_mebibytes`."""
        return self._ask(name, peak_mebibytes)

    def _ask(self, name: str, measure: Callable[[Task, torch.device], float]) -> float:
        self._pipes[name].send((measure, self._device))
        answer: float = self._pipes[name].recv()
        return answer


def _serve(pipe: Connection, make: Callable[[], Prepared], threads: int) -> None:
    """Prepare a task, and measure it for every request from the pipe."""
    torch.set_num_threads(threads)
    prepared = make()
    pipe.send(prepared.prepared_s)
    while True:
        try:
            measure, device = pipe.recv()
        except EOFError:
            return
        pipe.send(measure(prepared.task, device))


def seconds(
    tasks: Mapping[str, Task],
    rounds: int,
    device: torch.device,
    settled: bool = False,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each task in every round; a round runs all tasks in a random order.

    Args:
        tasks: functions to time, by name.
        rounds: number of rounds.
        device: device that the tasks compute on.
        settled: whether to run each task once more right before it is timed, so that its time does
            not depend on the memory, caches and threads that the previous task left behind.
        warm: whether to run each task once before the first round, to compile and to fill caches.
    """
    timed = {name: partial(once, task, device) for name, task in tasks.items()}
    return interleaved(timed, rounds, settled, warm)


def interleaved(
    timed: Mapping[str, Callable[[], float]], rounds: int, settled: bool = False, warm: bool = True
) -> dict[str, list[float]]:
    """As `seconds`, for tasks that return the seconds that they took."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for task in timed.values() if warm else ():
        task()
    order = list(timed)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if settled:
                timed[name]()
            taken[name].append(timed[name]())
    return taken


def once(task: Task, device: torch.device) -> float:
    """Seconds of a task, including what it runs on the device."""
    started = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(taken: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the ratio of two tasks' times in the same round."""
    return median([a / b for a, b in zip(taken[name], taken[base], strict=True)])


def copy_bandwidth(device: torch.device, mebibytes: int = 256) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    taken = seconds({"copy": lambda: target.copy_(source)}, 7, device)["copy"]
    return 2 * source.numel() * source.element_size() / median(taken)


def peak_mebibytes(task: Task, device: torch.device) -> float:
    """Peak memory of the tensors that a task, already run once, allocates in addition."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        task()
    events = profile.profiler.kineto_results.events()
    taken = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((bytes_ for _, bytes_ in taken), initial=0)) / 2**20
