"""What large runs are made of, measured in one process and one thread; see imagenet.py.

Seconds are those of a core, which other processes do not prolong, except for the disk's part.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fusenorm_openood.cli.inputs import load_detector
from fusenorm_openood.data.benchmarks import ImageSet
from fusenorm_openood.data.paths import manifest_paths
from fusenorm_openood.deployment.files import SHARD, FileShards, manifest
from fusenorm_openood.deployment.rows import RowFile
from fusenorm_openood.detectors.fitting import BlockSums, Sample
from fusenorm_openood.evaluation.runs import list_digest
from fusenorm_openood.method.scores import make_score
from fusenorm_openood.method.scores.base import NO_HEAD, Features
from fusenorm_openood.storage.shards import Columns, Key, ShardSet, decode

LOADED = 300  # images that are loaded to measure how fast that is


def loading(image_sets: Sequence[ImageSet]) -> dict[str, float]:
    """Images that one core decodes and resizes per second, and how large their files are."""
    items = [(s.images(), number) for s in image_sets for number in range(len(s.images()))]
    chosen = items[:: -(-len(items) // LOADED)]
    files = [images.data_dir / images.entries[number].name for images, number in chosen]
    chosen[0][0][0]  # imports and compiles what it needs
    begun = time.process_time()
    for images, number in chosen:
        images[number]
    return {
        "loaded_per_second": len(chosen) / (time.process_time() - begun),
        "bytes_per_jpeg": float(np.mean([file.stat().st_size for file in files])),
    }


def checking(image_sets: Sequence[ImageSet]) -> dict[str, float]:
    """Seconds per image before the first is scored: in each process, and in the first one."""
    images, clock = [s.images() for s in image_sets], [time.process_time()]
    for one in images:
        one.first_missing()
        list_digest(one)
    clock.append(time.process_time())
    for one in images:
        list(one.faults())
    clock.append(time.process_time())
    listed, opened = np.diff(clock) / sum(map(len, images))
    return {"list_seconds_per_image": float(listed), "open_seconds_per_image": float(opened)}


def shards_in(store: Path) -> list[Path]:
    """The shards of images in a store, which also has networks and faults of lists."""
    others = ("network-*", "*_faults-*")
    files = sorted(store.rglob("*.safetensors"))
    return [file for file in files if not any(map(file.parent.match, others))]


def shard_of(store: Path) -> Columns:
    """The columns of a shard of at most `SHARD` images, made of those in a store."""
    found = [decode(file.read_bytes())[1] for file in shards_in(store)]
    return {name: np.concatenate([c[name] for c in found])[:SHARD] for name in found[0]}


def storing(columns: Columns) -> dict[str, float]:
    """Bytes per image in a shard, and seconds per image to write and to read it."""
    rows = len(columns["pred"])
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(Path(folder), Key({}, "two", 2 * rows, rows))
        shards.write(0, columns)  # imports what it needs
        clock = [time.perf_counter()]
        path = Path(str(shards.write(1, columns)))
        clock.append(time.perf_counter())
        shards.read(1)
        clock.append(time.perf_counter())
        size = path.stat().st_size
    written, read = np.diff(clock) / rows
    return {
        "bytes_per_image": size / rows,
        "write_seconds_per_image": float(written),
        "read_seconds_per_image": float(read),
    }


def fitting(columns: Columns) -> dict[str, float]:
    """Seconds per image to sum up what mds is fitted on."""
    features = Features(*(torch.from_numpy(columns[name]) for name in Features._fields))
    sample = Sample()
    sample.add(features)
    mds, begun = make_score("mds++"), time.process_time()
    sums = BlockSums([mds])
    sums.add(features, torch.from_numpy(columns["pred"]))
    sums.fit(mds, sample, NO_HEAD)
    return {"fit_seconds_per_image": (time.process_time() - begun) / len(features.logits)}


def driving(listed: Path, detector: Path, columns: Columns) -> dict[str, float]:
    """Bytes and seconds per file in the driver of `fusenorm score`, when all have been scored."""
    tracemalloc.start()
    paths = manifest_paths(str(listed))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    clock = [time.process_time()]
    manifest(manifest_paths(str(listed)))
    clock.append(time.process_time())
    with tempfile.TemporaryDirectory() as folder, RowFile(Path(folder, "rows.csv")) as file:
        files = FileShards(
            load_detector(str(detector), None, None, None, "cpu"), paths, Path(folder)
        )
        for number in range(files.shards.key.shard_count):
            rows = len(files.shards.span(number))
            whole = {name: np.resize(c, (rows, *c.shape[1:])) for name, c in columns.items()}
            files.shards.write(number, whole)
        clock.append(time.process_time())
        for judged in files.judged(0.95):
            file.write(judged)
        clock.append(time.process_time())
        size = Path(folder, "rows.csv").stat().st_size
    begin, _, judge = np.diff(clock) / len(paths)
    return {
        "driver_bytes_per_image": held / len(paths),
        "driver_begin_seconds_per_image": float(begin),
        "driver_seconds_per_image": float(judge),
        "row_bytes": size / len(paths),
    }
