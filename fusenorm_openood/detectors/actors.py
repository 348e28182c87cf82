"""Score the shards of image files with the actors of a Ray cluster.

The driver deals out one shard at a time. An actor that ends, for whatever reason, is replaced, and
its shard goes to whichever actor is idle first. Ray's own restarts would leave that shard with the
restarted actor, which waits for ever if the cluster no longer has room for it.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from fusenorm_openood.detectors.folder import ImageFiles
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.sharded import FileShards, experts_record, scored
from fusenorm_openood.errors import ClusterError, ConfigError
from fusenorm_openood.store import ShardSet
from fusenorm_openood.urls import Place

TRIES = 3  # actors that may end while they score a shard, or in a row while they load the detector
_STORE = 100_000_000  # bytes of Ray's object store; shards do not go through it


@dataclass(repr=False)  # Ray asks for one before there is a detector
class Scorer:
    """What an actor does; it loads the detector once.

    Args:
        load: loads the detector.
        shards: the set that it writes to.
        batch_size, num_workers: settings of the data loader.
        threads: threads of torch.
        folder: where relative paths start.
    """

    load: Callable[[], FuseNorm]
    shards: ShardSet
    batch_size: int
    num_workers: int
    threads: int
    folder: str
    _detector: FuseNorm = field(init=False)

    def prepare(self) -> None:
        """Load the detector.

        Raises:
            FuseNormError: it cannot be loaded.
            ClusterError: it is not the one whose scores the set has.
        """
        with suppress(OSError):  # a node without shared folders
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        self._detector = self.load()
        if not experts_record(self._detector).items() <= self.shards.key.record.items():
            raise ClusterError(
                f"node {os.uname().nodename} has another detector, network or version of this "
                "package than the driver: give files that all nodes share"
            )

    def score(self, number: int, paths: Sequence[Place]) -> None:
        """Score the files of a shard, and write it."""
        files = ImageFiles(paths, self._detector.known_preprocessing())
        loader = DataLoader(files, self.batch_size, num_workers=self.num_workers, collate_fn=list)
        self.shards.write(number, scored(self._detector, loader))


@contextmanager
def cluster() -> Iterator[Any]:
    """Context with the module `ray`, connected to the cluster of `RAY_ADDRESS` or a local one.

    Raises:
        ConfigError: Ray is not installed.
        ClusterError: the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"engine ray needs Ray ({error}): pip install 'fusenorm-openood[ray]'"
        ) from None
    if ray.is_initialized():  # by the caller, who also ends it
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(
            address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else local)
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cluster {address or 'of this machine'} cannot be reached ({error}): check RAY_ADDRESS"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def score_with_actors(
    ray: Any,
    files: FileShards,
    load: Callable[[], FuseNorm],
    cores: int = 2,
    gpus: bool = True,
) -> Generator[int, None, None]:
    """Score the missing shards, one actor per GPU or, without any, per `cores` CPU cores.

    Args:
        ray: the module; see `cluster`.
        files: the files and their store, which all nodes can read and write.
        load: loads the detector in an actor.
        cores: CPU cores of an actor.
        gpus: whether to use GPUs.

    Yields:
        Shards, as soon as they are written.

    Raises:
        ClusterError: too few cores, or actors end again and again.
        FuseNormError: what an actor raises.
    """
    shards = files.shards
    waiting = shards.missing()
    resources = ray.cluster_resources()
    room, devices = int(resources.get("CPU", 0)) // cores, int(resources.get("GPU", 0))
    device = 1 if gpus and devices else 0
    if not room:
        raise ClusterError(
            f"the cluster has {resources.get('CPU', 0):g} CPU cores, and an actor takes {cores}: "
            "choose fewer with --cores-per-actor"
        )
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    actor = ray.remote(Scorer).options(num_cpus=cores, num_gpus=device)
    how = load, shards, files.batch_size, files.num_workers, threads, os.getcwd()

    idle: list[Any] = []
    running: dict[Any, tuple[Any, int | None]] = {}  # call -> its actor and shard; None = prepares
    ended = Counter[int | None]()

    def start() -> None:
        new = actor.remote(*how)
        running[new.prepare.remote()] = new, None

    try:
        for _ in range(min(len(waiting), room, devices if device else room)):
            start()
        left = len(waiting)
        while left:
            while waiting and idle:
                one, number = idle.pop(), waiting.pop(0)
                running[one.score.remote(number, files.paths_of(number))] = one, number
            (call,), _ = ray.wait(list(running), num_returns=1)
            one, done = running.pop(call)
            try:
                ray.get(call)
                ended[None] = 0
                idle.append(one)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                ray.kill(one)
                _count_end(ended, done, error)
                start()
                if done is not None and done not in shards.present():
                    waiting.insert(0, done)
                    continue
            if done is not None:
                left -= 1
                yield done
    finally:
        for one in [*idle, *(one for one, _ in running.values())]:
            ray.kill(one)


def _count_end(ended: Counter[int | None], number: int | None, error: Exception) -> None:
    """Count that an actor has ended; raise ClusterError if it is one too many."""
    ended[number] += 1
    doing = "loading the detector" if number is None else f"scoring shard {number}"
    reason = str(error).strip().splitlines()[0]
    if ended[number] >= TRIES:
        raise ClusterError(
            f"{TRIES} actors ended while {doing} ({reason}): see Ray's logs; memory is the usual "
            "reason, which a smaller --batch-size or more --cores-per-actor saves"
        )
    tqdm.write(f"fusenorm: an actor ended while {doing} ({reason}): replaced", file=sys.stderr)
