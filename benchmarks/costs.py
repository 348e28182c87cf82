"""Estimates of how long large runs take: measured parts, and GPUs that are assumed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simulated import full_count

from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.forward.recorded import SHARD


@dataclass(frozen=True)
class Assumed:
    """What was not measured.

    Attributes:
        resnet18, resnet50: images per second of a forward pass on one GPU, in float32.
        slowdown: how many times as long FuseNorm's pass takes.
        cores: CPU cores per GPU, all of which load images.
        price: of one GPU with these cores, in any currency per hour.
        startup: seconds until all processes score.
        archive: images of an archive.
        manifest: images per run of `fusenorm score`.
    """

    resnet18: float = 4500
    resnet50: float = 1500
    slowdown: float = 1.2
    cores: float = 12
    price: float = 2.5
    startup: float = 30
    archive: float = 1e9
    manifest: float = 1e7

    def on_gpu(self, benchmark: str) -> float:
        """Images per second that one GPU scores when it never waits for them."""
        forward = self.resnet18 if benchmark == "imagenet200" else self.resnet50
        return forward / self.slowdown


class Estimate(NamedTuple):
    """Seconds of a run, and what limits it."""

    scoring: float
    rest: float
    limit: str

    @property
    def seconds(self) -> float:
        return self.scoring + self.rest


def sets_of(name: str, fsood: bool, train: bool) -> list[int]:
    """Numbers of images of the lists that an evaluation reads, in their order."""
    benchmark = load_benchmark(name)
    image_sets = [benchmark.id["train"]] * train + [*benchmark.tested(fsood)]
    return [full_count(name, image_set.imagelist.stem) for image_set in image_sets]


def evaluation(
    name: str, counts: Sequence[int], gpus: int, fitted: int, parts: Mapping[str, Any], a: Assumed
) -> Estimate:
    """`fusenorm eval` with one process per GPU and an empty store.

    The list of the fit is scored when the process with most of its shards is ready, and so are all
    others, which are dealt out as one. Each process reads all shards, and sums up the images that a
    postprocessor is fitted on.
    """
    decoding, on_gpu = a.cores * parts["loaded_per_second"], a.on_gpu(name)
    each = 1 / min(decoding, on_gpu) + parts["eval"]["write_seconds_per_image"]
    fit, *tested = (math.ceil(n / SHARD) for n in counts)
    dealt = math.ceil(fit / gpus) + math.ceil(sum(tested) / gpus)
    most = min(SHARD * dealt, sum(counts))
    scoring, even = most * each, sum(counts) * each / gpus
    read = parts["eval"]["read_seconds_per_image"]
    checks = parts["list_seconds_per_image"] + parts["open_seconds_per_image"]
    after = sum(counts) * (checks + read) + fitted * parts["fit_seconds_per_image"]
    limit = "decoding" if decoding < on_gpu else "GPU"
    if scoring > 1.5 * even:
        limit = "few shards"
    if a.startup + after > scoring:
        limit = "start" if a.startup > after else "one core per process"
    return Estimate(scoring, a.startup + after, limit)


def scoring(gpus: int, parts: Mapping[str, Any], a: Assumed) -> Estimate:
    """`fusenorm score --engine ray`, one manifest after another, one actor per GPU."""
    decoding, on_gpu = a.cores * parts["loaded_per_second"], a.on_gpu("imagenet")
    each = 1 / min(decoding, on_gpu) + parts["score"]["write_seconds_per_image"]
    actors = SHARD * math.ceil(a.manifest / SHARD / gpus) * each
    driver = a.manifest * parts["driver_seconds_per_image"]
    begin = a.startup + a.manifest * parts["driver_begin_seconds_per_image"]
    limit = "driver" if driver > actors else "decoding" if decoding < on_gpu else "GPU"
    if begin > max(actors, driver):
        limit = "listing"
    runs = a.archive / a.manifest
    return Estimate(runs * max(actors, driver), runs * begin, limit)
