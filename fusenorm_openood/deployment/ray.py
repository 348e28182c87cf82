"""Score the shards of image files with the actors of a Ray cluster.

An actor that ends, for whatever reason, is replaced, and its shard goes to whichever actor is idle
first. Ray's own restarts would leave it with the restarted actor, which waits for ever if the
cluster no longer has room for it.
"""

import logging
import os
import platform
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.deployment.files import FileShards, ImageFiles, experts_key, scored
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import ClusterError, FuseNormError, import_extra, is_lost_loader
from fusenorm_openood.storage.shards import ShardSet
from fusenorm_openood.storage.stored import Batches, row_batches
from fusenorm_openood.storage.urls import Place

log = logging.getLogger(__name__)

TRIES = 3  # actors that may end at one shard, or in a row before any shard
_OBJECTS = 100_000_000  # bytes of the object store of a local cluster; results do not go through it


@contextmanager
def cluster() -> Iterator[Any]:
    """Context with the module `ray`, connected to the cluster of `RAY_ADDRESS` or a local one.

    Standard output is redirected to standard error: Ray prints messages of its nodes. A local
    cluster sends no usage statistics unless `RAY_USAGE_STATS_ENABLED` says so. ConfigError if Ray
    is not installed, ClusterError if the cluster cannot be reached.
    """
    ray = import_extra("ray", "engine ray", "ray")
    if ray.is_initialized():  # by the caller, who also ends it
        with redirect_stdout(sys.stderr):
            yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    how: dict[str, Any] = (
        {} if address else {"include_dashboard": False, "object_store_memory": _OBJECTS}
    )
    terminated = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ClusterError(
            f"cluster {address or 'of this machine'} cannot be reached ({why}): check RAY_ADDRESS, "
            "and RAY_AUTH_MODE and the token if it needs one"
        ) from None
    try:
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and terminated is not None:  # None: it is not Python's
            signal.signal(signal.SIGTERM, terminated)


def shape(ray: Any, cores: int, gpus: bool) -> tuple[int, dict[str, int]]:
    """How many actors with so many cores there is room for, and the resources of each.

    With `gpus` an actor has a GPU, if the cluster has any. ClusterError if there are fewer cores.
    """
    has = ray.cluster_resources()
    room, devices = int(has.get("CPU", 0)) // cores, int(has.get("GPU", 0)) if gpus else 0
    if not room:
        raise ClusterError(
            f"the cluster has {has.get('CPU', 0):g} CPU cores, and an actor takes {cores}: choose "
            "fewer with --cores-per-actor"
        )
    return min(room, devices or room), {"num_cpus": cores, "num_gpus": min(devices, 1)}


@dataclass(repr=False)  # Ray asks for one before there is a detector
class Scorer:
    """What an actor does; it loads the detector once, and then scores shards."""

    load: Callable[[], FuseNorm]  # the detector
    shards: ShardSet  # that it writes to
    batch_size: int
    num_workers: int
    threads: int  # of torch
    folder: str  # where relative paths start
    _detector: FuseNorm = field(init=False)

    def prepare(self) -> None:
        """Load the detector; ClusterError if it is not the one whose scores the set has."""
        with suppress(OSError):  # a node without shared folders
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        self._detector = self.load()
        store = self.shards.folder.parent
        if not experts_key(self._detector, store).items() <= self.shards.key.record.items():
            raise ClusterError(
                f"node {platform.node()} has another detector, network or version of this package "
                "than the driver: give files that all nodes share"
            )

    def score(self, number: int, paths: Sequence[Place]) -> None:
        """Score the files of a shard, and write it."""
        files = ImageFiles(paths, self._detector.known_preprocessing())
        batches: Batches = row_batches(range(len(paths)), self.batch_size)
        how: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": list}
        loader = CpuLoader(files, batch_sampler=batches, **how)
        self.shards.write(number, scored(self._detector, loader))


def score_with_actors(
    ray: Any, files: FileShards, load: Callable[[], FuseNorm], cores: int = 2, gpus: bool = True
) -> Generator[int, None, None]:
    """Score the missing shards, one actor per GPU or, without any, per `cores` CPU cores.

    An actor loads the detector with `load`, and scores one shard at a time, with as many threads as
    `OMP_NUM_THREADS` says, or one. All nodes read and write the store of `files`. For `ray`,
    `cores` and `gpus` see `cluster` and `shape`. Yields shards as soon as they are written.
    ClusterError for too few cores, or if actors end again and again; also what an actor raises.
    """
    count, resources = shape(ray, cores, gpus)
    create = ray.remote(Scorer).options(**resources).remote
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    how = load, files.shards, files.batch_size, files.num_workers, threads, os.getcwd()
    waiting, idle, ended = files.shards.missing()[::-1], list[Any](), Counter[int | None]()
    running: dict[Any, tuple[Any, int | None]] = {}  # call -> actor and shard; None = prepares
    left = len(waiting)
    try:
        while left:
            while waiting and idle:
                actor, number = idle.pop(), waiting.pop()
                running[actor.score.remote(number, files.paths_of(number))] = actor, number
            while len(running) < min(count, left):
                actor = create(*how)
                running[actor.prepare.remote()] = actor, None
            (call,), _ = ray.wait(list(running), num_returns=1)
            actor, done = running.pop(call)
            try:
                ray.get(call)
                ended[None] = 0
                idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                is_clear = isinstance(error.cause, FuseNormError) or is_lost_loader(error.cause)
                raise (error.cause if is_clear else error) from None
            except ray.exceptions.RayError as error:
                ray.kill(actor)
                _count(ended, done, error)
                if done is not None and done not in files.shards.present():
                    waiting.append(done)
                    continue
            if done is not None:
                left -= 1
                yield done
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            ray.kill(actor)


def _count(ended: Counter[int | None], shard: int | None, error: Exception) -> None:
    """Count that an actor has ended; raise ClusterError if it is one too many."""
    ended[shard] += 1
    doing = "loading the detector" if shard is None else f"scoring shard {shard}"
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if ended[shard] >= TRIES:
        raise ClusterError(
            f"{TRIES} actors ended while {doing} ({reason}): see Ray's logs; memory is the usual "
            "reason, which a smaller --batch-size or more --cores-per-actor saves"
        )
    log.warning(f"an actor ended while {doing} ({reason}): replaced")
