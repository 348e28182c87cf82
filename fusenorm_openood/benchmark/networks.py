"""Load the networks of the training runs under one root."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.networks.checkpoints import check_classes, load_network
from fusenorm_openood.networks.kind import network_kind


def load_runs(
    checkpoints: Mapping[str, Path],
    num_classes: int,
    network: str | None = None,
    image_size: int | None = None,
) -> dict[str, nn.Module]:
    """The networks of the training runs under one root, which must be of the same kind.

    Args:
        checkpoints: file by run; see `find_checkpoints`.
        num_classes: number of classes of the ID data set.
        network, image_size: see `load_network`.

    Raises:
        CheckpointError: a file without a known network; runs that differ in architecture,
            training method or number of classes; a number of classes other than the data set's.
        ConfigError: `network` cannot be built.
    """
    expected = num_classes if network else None  # a network that is recognised says its own
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
