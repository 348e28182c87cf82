"""What a command line names: checkpoints, images, a store, a detector; whether they are usable."""

import logging
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, how_to_get
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.saving import read_source
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError
from fusenorm_openood.evaluation.runs import Run, find_checkpoints, find_faults
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.network import build_network, load_network, named
from fusenorm_openood.storage.torchrun import this_process

log = logging.getLogger(__name__)

_NOT_LOCAL = re.compile(r"[\\/]{2}|[A-Za-z][A-Za-z0-9+.-]+:")  # URLs, network shares


def check_files(
    benchmark: Benchmark, image_sets: Iterable[ImageSet], roots: Sequence[str] = ()
) -> dict[str, dict[str, Path]]:
    """The checkpoints of the training runs under each root, after a check that no file is missing.

    DataError or CheckpointError if files are missing, all listed in one message; DataError for a
    label of an ID image that is no class of the benchmark.
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

    With a store, files are not opened again until they change. DataError if images cannot be read;
    the message lists all of them.
    """
    faults = [f for image_set in image_sets for f in find_faults(image_set.images(), store)]
    truncated = [where for where, fault in faults if fault == "truncated"]
    unreadable = [f"{where} ({fault})" for where, fault in faults if fault != "truncated"]
    if truncated:
        log.warning(
            f"{len(truncated)} truncated image(s), read as in OpenOOD, with missing rows in grey:"
            f"{_listed(truncated)}"
        )
    if unreadable:
        raise DataError(
            f"{len(unreadable)} image(s) cannot be read:{_listed(unreadable)}\n"
            "Restore or replace these files."
        )


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  - {line}" for line in lines)


def store_of(given: str | None) -> Path | None:
    """The folder of `--store`, None for `none`; ConfigError if several processes have none."""
    if given not in (None, "none"):
        return Path(str(given))
    if (world := this_process().world) > 1:
        raise ConfigError(
            f"{world} processes meet in a store: give --store DIR, which all can write to"
        )
    return None


def log_throughput(runs: Mapping[str, Run]) -> None:
    """Log how fast images were scored for a store, if any were."""
    counted = next(iter(runs.values())).throughput
    if counted.images and this_process().leads:
        log.info(f"{counted.images:,} images scored, {counted}")


def load_detector(
    file: str,
    network: str | None = None,
    weights: str | None = None,
    bits: int | None = None,
    device: str = "auto",
    by_order: bool = False,
) -> FuseNorm:
    """The detector of a file, with the network that is given, or else the one that `fit` had.

    A file may come from others, so that it names no code: of the network in it only the name of an
    architecture of torchvision or timm is followed, and a path of weights on this machine.
    DetectorFileError for a file that cannot be read, or another network; CheckpointError or
    ConfigError for a network that cannot be loaded, or that must be given.
    """
    on, source = own_device(device), read_source(Path(file))
    if network is None and source.network is not None and not named.is_catalogued(source.network):
        raise ConfigError(
            f"detector file {file} names the network {source.network!r}, and no file is trusted "
            "to name code: if you trust it yourself, give it with --network"
        )
    if weights is None and source.weights is not None and _NOT_LOCAL.match(source.weights):
        raise ConfigError(
            f"detector file {file} names the weights {source.weights!r}, which are not on "
            "this machine: give a checkpoint with --weights"
        )
    size = None if source.image_size is None else int(source.image_size)
    network = source.network if network is None else network
    weights = source.weights if weights is None else weights
    net = load_or_build(network, weights, size, by_order)
    detector = FuseNorm.load(file, net.to(on))
    if bits is not None:
        detector.preprocessing = replace(detector.known_preprocessing(), bits=bits)
    return detector


def of_detector(args: Namespace) -> tuple[str, str | None, str | None, int | None, str, bool]:
    """What `load_detector` takes, from the options of a command."""
    device = getattr(args, "device", "cpu")
    return args.detector, args.network, args.weights, args.bits, device, args.weights_by_order


def load_or_build(
    network: str | None, weights: str | None, image_size: int | None, by_order: bool = False
) -> nn.Module:
    """The network of `--network` and `--weights`; ConfigError without either of them."""
    if weights is not None:
        return load_network(weights, None, network, image_size, by_order)
    if network is None:
        raise ConfigError("a network is needed: give --weights FILE, --network SPEC, or both")
    return build_network(network, image_size=image_size)
