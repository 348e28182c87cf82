"""Score the shards of image files with the actors of a Ray cluster."""

import os
import platform
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fusenorm_openood.data.loader import CpuLoader
from fusenorm_openood.detectors.cluster import deal, shape
from fusenorm_openood.detectors.folder import ImageFiles
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.sharded import FileShards, experts_record, scored
from fusenorm_openood.errors import ClusterError
from fusenorm_openood.store import ShardSet
from fusenorm_openood.store.loading import Batches, row_batches
from fusenorm_openood.urls import Place


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
        store = self.shards.folder.parent
        if not experts_record(self._detector, store).items() <= self.shards.key.record.items():
            raise ClusterError(
                f"node {platform.node()} has another detector, network or version of this package "
                "than the driver: give files that all nodes share"
            )

    def score(self, number: int, paths: Sequence[Place]) -> None:
        """Score the files of a shard, and write it."""
        files = ImageFiles(paths, self._detector.known_preprocessing())
        batches: Batches = row_batches(range(len(paths)), self.batch_size)
        loader = CpuLoader(
            files, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list
        )
        self.shards.write(number, scored(self._detector, loader))


def score_with_actors(
    ray: Any, files: FileShards, load: Callable[[], FuseNorm], cores: int = 2, gpus: bool = True
) -> Generator[int, None, None]:
    """Score the missing shards, one actor per GPU or, without any, per `cores` CPU cores.

    An actor has as many threads as `OMP_NUM_THREADS` says, or one.

    Args:
        ray: the module; see `cluster`.
        files: the files and their store, which all nodes can read and write.
        load: loads the detector in an actor.
        cores, gpus: see `shape`.

    Yields:
        Shards, as soon as they are written.

    Raises:
        ClusterError: too few cores, or actors end again and again.
        FuseNormError: what an actor raises.
    """
    count, resources = shape(ray, cores, gpus)
    actor = ray.remote(Scorer).options(**resources)
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    how = load, files.shards, files.batch_size, files.num_workers, threads, os.getcwd()
    yield from deal(
        ray,
        lambda: actor.remote(*how),
        count,
        files.shards.missing(),
        lambda one, number: one.score.remote(number, files.paths_of(number)),
        lambda number: number in files.shards.present(),
    )
