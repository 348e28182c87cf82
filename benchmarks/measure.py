"""Time and memory of pieces of work, measured side by side."""

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

Work = Callable[[], Any]
# What takes long to import, if it is there; a process that is forked off has it.
PRELOAD = ["torch", "numba", "sklearn.metrics", "openood.postprocessors", "pytorch_ood.detector"]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's


class Made(NamedTuple):
    """A piece of work, and the seconds that its preparation took."""

    work: Work
    prepared_s: float = 0.0


class Apart:
    """Pieces of work, each in a process of its own that does nothing else.

    What a process did before decides how long its allocator takes over large tensors: within one
    process the same forward pass was seen to take 1.0 or 1.5 seconds, by what else ran there.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Made]], device: torch.device) -> None:
        """Prepare works one after another; ``makers`` are pickled."""
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

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes.values():
            pipe.close()

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """As :func:`seconds` says, in the works' own processes."""
        return in_turns({name: partial(self._ask, name, once) for name in self._pipes}, rounds)

    def peak_mebibytes(self, name: str) -> float:
        """Memory of the tensors of one of the works; see :func:`peak_mebibytes`."""
        return self._ask(name, peak_mebibytes)

    def _ask(self, name: str, measure: Callable[[Work, torch.device], float]) -> float:
        self._pipes[name].send((measure, self._device))
        answer: float = self._pipes[name].recv()
        return answer


def _serve(pipe: Connection, make: Callable[[], Made], threads: int) -> None:
    """Measure a work as often as the other end of the pipe asks."""
    torch.set_num_threads(threads)
    made = make()
    pipe.send(made.prepared_s)
    while True:
        try:
            measure, device = pipe.recv()
        except EOFError:
            return
        pipe.send(measure(made.work, device))


def seconds(
    works: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    settled: bool = False,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each work in every round; a round does all of them, in an order of its own.

    ``warm``: each is done once before the first round: that compiles, and fills caches.
    ``settled``: each is done once more before it is timed, so that it does not pay for the state
    that the one before it left memory, caches and threads in.
    """
    timed = {name: partial(once, work, device) for name, work in works.items()}
    return in_turns(timed, rounds, settled, warm)


def in_turns(
    timed: Mapping[str, Callable[[], float]], rounds: int, settled: bool = False, warm: bool = True
) -> dict[str, list[float]]:
    """What :func:`seconds` says, of works that tell the seconds that they took."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for work in timed.values() if warm else ():
        work()
    order = list(timed)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if settled:
                timed[name]()
            taken[name].append(timed[name]())
    return taken


def once(work: Work, device: torch.device) -> float:
    """Seconds of a work, to the end of what it asked of the device."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(taken: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the time of one work over that of another in the same round."""
    return median([a / b for a, b in zip(taken[name], taken[base], strict=True)])


def copy_bandwidth(device: torch.device, mebibytes: int = 256) -> float:
    """Bytes that a copy reads and writes in a second."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    taken = seconds({"copy": lambda: target.copy_(source)}, 7, device)["copy"]
    return 2 * source.numel() * source.element_size() / median(taken)


def peak_mebibytes(work: Work, device: torch.device) -> float:
    """Memory of the tensors that a work, done before, holds at most beyond what was held then."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    taken = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((bytes_ for _, bytes_ in taken), initial=0)) / 2**20
