"""Time and memory of pieces of work, measured side by side."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch

Work = Callable[[], Any]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's


def seconds(
    works: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    settled: bool = False,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each work in every round; a round does all of them, in an order of its own.

    ``settled``: each is done once more before it is timed, so that it does not pay for the state
    that the one before it left memory, caches and threads in.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values() if warm else ():
        once(work, device)  # compiles, fills caches
    order = list(works)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if settled:
                works[name]()
            taken[name].append(once(works[name], device))
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
