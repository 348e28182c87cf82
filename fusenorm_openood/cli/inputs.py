"""The checkpoints, the images and the stored scores of benchmarks."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, how_to_get
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError
from fusenorm_openood.evaluation.records import Records, find_faults, network_record
from fusenorm_openood.evaluation.runs import find_checkpoints
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.storage.torchrun import this_process


def check_files(
    benchmark: Benchmark, image_sets: Iterable[ImageSet], roots: Sequence[str] = ()
) -> dict[str, dict[str, Path]]:
    """The checkpoints of the training runs under each root, after a check that no file is missing.

    Raises:
        DataError, CheckpointError: files are missing, all listed in one message.
        DataError: a label of an ID image that is no class of the benchmark.
    """
    image_sets, checkpoints = list(image_sets), {}
    missing = benchmark.missing(image_sets)
    problems = [*missing[:3], *([f"and {len(missing) - 3} more"] if len(missing) > 3 else [])]
    for root in roots:
        try:
            checkpoints[root] = find_checkpoints(root)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise (DataError if missing else CheckpointError)(
            f"{benchmark.name} needs files that are missing:{_listed(problems)}\n"
            f"{how_to_get(benchmark.name)}. Or give their location with --data-root"
            f"{' and --root' if roots else ''}."
        )
    benchmark.check_labels(image_sets)
    return checkpoints


def check_readable(image_sets: Iterable[ImageSet], store: Path | None = None) -> None:
    """Warn about truncated images, which are read as in OpenOOD, with missing rows in grey.

    With a store, files are not opened again until they change.

    Raises:
        DataError: images that cannot be read; the message lists all of them.
    """
    faults = [f for image_set in image_sets for f in find_faults(image_set.images(), store)]
    truncated = [where for where, fault in faults if fault == "truncated"]
    unreadable = [f"{where} ({fault})" for where, fault in faults if fault != "truncated"]
    if truncated:
        print(
            f"fusenorm: {len(truncated)} truncated image(s), read as in OpenOOD, with missing rows "
            f"in grey:{_listed(truncated)}",
            file=sys.stderr,
        )
    if unreadable:
        raise DataError(
            f"{len(unreadable)} image(s) cannot be read:{_listed(unreadable)}\n"
            "Restore or replace these files."
        )


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  - {line}" for line in lines)


def store_of(given: str) -> Path | None:
    """The folder of `--store`, None for `none`."""
    return None if given == "none" else Path(given)


def records_of(
    store: Path | None,
    checkpoints: Mapping[str, Path],
    network: str | None,
    image_size: int,
    batch_size: int,
    num_workers: int,
    **how: Any,
) -> dict[str, Records]:
    """The stored scores of each run; empty without a store.

    For `network`, `image_size` and `how` see `network_record`.

    Raises:
        ConfigError: several processes without a store.
    """
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
            store, network_record(path, network, image_size, **how), batch_size, num_workers, pace
        )
        for run, path in checkpoints.items()
    }


def print_throughput(records: Mapping[str, Records]) -> None:
    """Print to standard error how fast images were scored, if any were."""
    pace = next((kept.pace for kept in records.values()), Pace())
    if pace.images and this_process().leads:
        print(f"fusenorm: {pace.images:,} images scored, {pace}", file=sys.stderr)
