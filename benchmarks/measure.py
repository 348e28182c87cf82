"""Time and memory of pieces of work, measured side by side."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


def seconds(
    works: Mapping[str, Work], rounds: int, device: torch.device, settled: bool = False
) -> dict[str, list[float]]:
    """Seconds of each work in every round; a round does all of them, one after another.

    ``settled``: each is done once more before it is timed, so that it does not pay for the memory
    that the one before it took from the process or gave back.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        once(work, device)  # compiles, fills caches
    for _ in range(rounds):
        for name, work in works.items():
            if settled:
                work()
            taken[name].append(once(work, device))
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


def peak_mebibytes(work: Work, device: torch.device) -> float | None:
    """Memory that a work holds at most beyond what was held before; None where none can say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    work()
    return (_resident("VmHWM") - before) / 1024


def _resident(name: str) -> int:
    """A line of the process's memory, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
