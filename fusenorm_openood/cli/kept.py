"""What `--store` keeps of training runs."""

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusenorm_openood.benchmark.records import Records, network_record
from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.listening.pace import Pace
from fusenorm_openood.torchrun import this_process


def store_of(args: Namespace) -> Path | None:
    """The folder of the store, None with `--store none`."""
    return None if args.store == "none" else Path(args.store)


def records_of(
    args: Namespace, benchmark: Benchmark, checkpoints: Mapping[str, Path], **how: Any
) -> dict[str, Records]:
    """What is kept of each run, by run; empty with `--store none`.

    Args:
        args: with `store`, `network`, `batch_size` and `num_workers`.
        benchmark: the benchmark of the images.
        checkpoints: file by run.
        how: how the networks are run.

    Raises:
        ConfigError: several processes without a store.
    """
    store = store_of(args)
    if store is None:
        if this_process().world > 1:
            raise ConfigError(
                "several processes meet in the store, got --store none: give a folder that all of "
                "them can write to"
            )
        return {}
    pace = Pace()
    return {
        run: Records(
            store,
            network_record(path, args.network, benchmark.image_size, **how),
            args.batch_size,
            args.num_workers,
            pace,
        )
        for run, path in checkpoints.items()
    }


def say_pace(records: Mapping[str, Records]) -> None:
    """Say on standard error how fast images were scored, if any were."""
    pace = next((kept.pace for kept in records.values()), Pace())
    if pace.images and this_process().leads:
        print(f"fusenorm: {pace.images:,} images scored, {pace}", file=sys.stderr)
