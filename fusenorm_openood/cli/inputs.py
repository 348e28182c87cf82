"""What a command reads, checked before any work: images, checkpoints, networks."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from fusenorm_openood.benchmark.runs import find_checkpoints, parse_root_name
from fusenorm_openood.cli.engines import Job
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.data.sources import how_to_get
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError, TapError
from fusenorm_openood.files import check_writable
from fusenorm_openood.training.digits import train_digits
from fusenorm_openood.training.recipes import METHODS


def check_files(
    benchmark: Benchmark, root: str | Path, image_sets: Iterable[ImageSet]
) -> dict[str, Path]:
    """The checkpoints of all training runs, once all images that will be read are known to exist.

    Raises:
        DataError, CheckpointError: something is missing or cannot be read; one message says all
            of it.
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
    if not missing:
        check_readable(image_sets)
    if problems:
        kind = DataError if missing else CheckpointError
        listed = "\n  - ".join(problems)
        raise kind(
            f"{benchmark.name} needs files that are missing:\n  - {listed}\n"
            f"{how_to_get(benchmark.name)}. Or say where they are: --data-root, --root."
        )
    return checkpoints


def check_images(benchmark: Benchmark, image_sets: Iterable[ImageSet]) -> None:
    """DataError that says how to get a benchmark of which images or lists are missing."""
    missing = benchmark.missing(image_sets)
    if missing:
        raise DataError(f"{missing[0]}: {how_to_get(benchmark.name)}. Or give --data-root.")


def check_readable(image_sets: Iterable[ImageSet]) -> None:
    """Warn of all truncated images, which are read as OpenOOD reads them, missing rows in grey.

    Raises:
        DataError: images that cannot be read; it names all of them.
    """
    faults = [fault for image_set in image_sets for fault in image_set.images().faults()]
    truncated = [where for where, fault in faults if fault == "truncated"]
    unreadable = [f"{where} ({fault})" for where, fault in faults if fault != "truncated"]
    if truncated:
        listed = "\n  - ".join(truncated)
        print(
            f"fusenorm: {len(truncated)} truncated image(s), read as OpenOOD reads them, their "
            f"missing rows in grey:\n  - {listed}",
            file=sys.stderr,
        )
    if unreadable:
        listed = "\n  - ".join(unreadable)
        raise DataError(
            f"{len(unreadable)} image(s) cannot be read:\n  - {listed}\nRestore these files."
        )


def check_networks(
    job: Job, networks: Mapping[str, nn.Module], checkpoints: Mapping[str, Path]
) -> None:
    """Refuse a network that the detector cannot work on, before any is scored; name its run."""
    for run, net in networks.items() if job.is_native else ():
        try:
            job.detector(net)
        except (CheckpointError, ConfigError, TapError) as error:
            raise type(error)(f"{checkpoints[run]}: {error}") from None


def ensure_digits(data_root: str | Path, root: str | Path, progress: bool = False) -> None:
    """Make what the digits benchmark needs and does not have yet: images, a trained network."""
    try:
        find_checkpoints(root)
        write_digits(data_root)
    except CheckpointError:
        check_writable(Path(root), "--root")
        # The folder's name says how its network is to be trained.
        name = parse_root_name(root)
        method = name.trainer if name and name.trainer in METHODS else "base"
        train_digits(data_root, root, method=method, progress=progress)
