"""Load the networks of the training runs under one root."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from fusenorm_openood.benchmark.records import Records
from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.networks.checkpoints import check_classes, load_network
from fusenorm_openood.networks.kind import network_kind
from fusenorm_openood.networks.lazy import LazyNetwork
from fusenorm_openood.structure.reading import Structure


def load_runs(
    checkpoints: Mapping[str, Path],
    num_classes: int,
    network: str | None = None,
    image_size: int | None = None,
    records: Mapping[str, Records] | None = None,
) -> dict[str, nn.Module]:
    """The networks of the training runs under one root, which must be of the same kind.

    Those that all are known from earlier are only loaded when they are to run.

    Args:
        checkpoints: file by run; see `find_checkpoints`.
        num_classes: number of classes of the ID data set.
        network, image_size: see `load_network`.
        records: what is kept of each run's network, if anything is.

    Raises:
        CheckpointError: a file without a known network; runs that differ in architecture,
            training method or number of classes; a number of classes other than the data set's.
        ConfigError: `network` cannot be built.
    """
    expected = num_classes if network else None  # a network that is recognised says its own
    known = {run: kept.known() for run, kept in (records or {}).items()}
    structures = [found and found.structure for found in known.values()]
    if structures and _is_one_kind(structures, num_classes):
        return {
            run: LazyNetwork(partial(load_network, path, expected, network, image_size), known[run])
            for run, path in checkpoints.items()
        }
    networks = {
        run: load_network(path, expected, network, image_size) for run, path in checkpoints.items()
    }
    (first, kind), *others = [(run, network_kind(net, network)) for run, net in networks.items()]
    for run, other in others:
        if other != kind:
            raise CheckpointError(
                f"all runs under one root must be of the same kind, got {checkpoints[first]}, a "
                f"{kind}, and {checkpoints[run]}, a {other}: use a separate root for each kind"
            )
    check_classes(checkpoints[first], kind.classes, num_classes)
    return networks


def _is_one_kind(structures: Sequence[Structure | None], num_classes: int) -> bool:
    """Whether networks are all known, of one kind, and for so many classes."""
    known = [s for s in structures if s is not None]
    kinds = [(s.classes, s.blocks, s.shapes, s.scoring) for s in known]
    same = len(known) == len(structures) and kinds == kinds[:1] * len(kinds)
    return same and known[0].classes == num_classes
