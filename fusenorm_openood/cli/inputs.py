"""Networks, images and the store of `eval`, `compare` and `train`."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fusenorm_openood.cli.engines import Job
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, how_to_get
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError, TapError
from fusenorm_openood.evaluation.records import Records, find_faults, network_record
from fusenorm_openood.evaluation.runs import find_checkpoints
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.storage.files import check_writable
from fusenorm_openood.storage.torchrun import this_process
from fusenorm_openood.training.loop import train_digits
from fusenorm_openood.training.recipes import METHODS, find_recipe


def check_files(
    benchmark: Benchmark, root: str | Path, image_sets: Iterable[ImageSet]
) -> dict[str, Path]:
    """The checkpoints of all training runs, after checking that no image is missing.

    Args:
        benchmark: the benchmark of the images.
        root: folder of the training runs, or a checkpoint file.
        image_sets: the images.

    Raises:
        DataError, CheckpointError: files are missing, all listed in one message.
        DataError: a label of an ID image that is no class of the benchmark.
    """
    problems: list[str] = []
    image_sets = list(image_sets)
    missing = benchmark.missing(image_sets)
    if missing:
        problems += [*missing[:3], *([f"and {len(missing) - 3} more"] if len(missing) > 3 else [])]
    checkpoints = {}
    try:
        checkpoints = find_checkpoints(root)
    except CheckpointError as error:
        problems.append(str(error))
    if problems:
        kind = DataError if missing else CheckpointError
        listed = "\n  - ".join(problems)
        raise kind(
            f"{benchmark.name} needs files that are missing:\n  - {listed}\n"
            f"{how_to_get(benchmark.name)}. Or give their location with --data-root and --root."
        )
    benchmark.check_labels(image_sets)
    return checkpoints


def check_images(benchmark: Benchmark, image_sets: Iterable[ImageSet]) -> None:
    """Raise DataError, saying how to get the benchmark, if images or lists are missing.

    Labels of ID images are checked as well, see `Benchmark.check_labels`.
    """
    image_sets = list(image_sets)
    missing = benchmark.missing(image_sets)
    if missing:
        raise DataError(
            f"{missing[0]}: {how_to_get(benchmark.name)}. Or give the location with --data-root."
        )
    benchmark.check_labels(image_sets)


def check_readable(image_sets: Iterable[ImageSet], store: Path | None = None) -> None:
    """Warn about truncated images, which are read as in OpenOOD, with missing rows in grey.

    Args:
        image_sets: the images.
        store: see `find_faults`.

    Raises:
        DataError: images that cannot be read; the message lists all of them.
    """
    faults = [f for image_set in image_sets for f in find_faults(image_set.images(), store)]
    truncated = [where for where, fault in faults if fault == "truncated"]
    unreadable = [f"{where} ({fault})" for where, fault in faults if fault != "truncated"]
    if truncated:
        listed = "\n  - ".join(truncated)
        print(
            f"fusenorm: {len(truncated)} truncated image(s), read as in OpenOOD, with missing rows "
            f"in grey:\n  - {listed}",
            file=sys.stderr,
        )
    if unreadable:
        listed = "\n  - ".join(unreadable)
        raise DataError(
            f"{len(unreadable)} image(s) cannot be read:\n  - {listed}\n"
            "Restore or replace these files."
        )


def check_networks(
    job: Job, networks: Mapping[str, nn.Module], checkpoints: Mapping[str, Path]
) -> None:
    """Raise, naming the run, if a network is unsuitable for the detector, before any is scored."""
    for run, net in networks.items() if job.is_native else ():
        try:
            job.detector(net)
        except (CheckpointError, ConfigError, TapError) as error:
            raise type(error)(f"{checkpoints[run]}: {error}") from None


def ensure_digits(data_root: str | Path, root: str | Path, progress: bool = False) -> None:
    """Create what the digits benchmark is missing: its images, its trained network.

    A network is only trained under a root that has the name of a recipe of the digits.

    Raises:
        CheckpointError: a root of another name without a checkpoint.
    """
    try:
        find_checkpoints(root)
        write_digits(data_root)
    except CheckpointError as error:
        methods = [m for m in METHODS if Path(root).resolve().name == _digits_root(m)]
        if not methods:
            roots = " or ".join(f"results/{_digits_root(method)}" for method in METHODS)
            raise CheckpointError(
                f"{error}; a network for the digits is trained for --root {roots}"
            ) from None
        check_writable(Path(root), "--root")
        train_digits(data_root, root, method=methods[0], progress=progress)


def _digits_root(method: str) -> str:
    return Path(find_recipe("digits", method=method).run_name).parent.name


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
