"""The detector and the network that a command line names."""

import re
from dataclasses import replace
from pathlib import Path

from torch import nn

from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.saving import read_source
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.network import build_network, load_network
from fusenorm_openood.network.named import is_catalogued

_NOT_LOCAL = re.compile(r"[\\/]{2}|[A-Za-z][A-Za-z0-9+.-]+:")  # URLs, network shares


def load_detector(
    file: str,
    network: str | None = None,
    weights: str | None = None,
    bits: int | None = None,
    device: str = "auto",
) -> FuseNorm:
    """The detector of a file, with the network that is given, or else the one that `fit` had.

    A file may come from others, so that it names no code: of the network in it only the name of an
    architecture of torchvision or timm is followed, and a path of weights on this machine.

    Raises:
        DetectorFileError: a file that cannot be read, or another network.
        CheckpointError, ConfigError: a network that cannot be loaded, or that must be given.
    """
    on, source = own_device(device), read_source(Path(file))
    if network is None and source.network is not None and not is_catalogued(source.network):
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
    net = load_or_build(
        source.network if network is None else network,
        source.weights if weights is None else weights,
        size,
    )
    detector = FuseNorm.load(file, net.to(on))
    if bits is not None:
        detector.preprocessing = replace(detector.known_preprocessing(), bits=bits)
    return detector


def load_or_build(network: str | None, weights: str | None, image_size: int | None) -> nn.Module:
    """The network of `--network` and `--weights`; ConfigError without either of them."""
    if weights is not None:
        return load_network(weights, network=network, image_size=image_size)
    if network is None:
        raise ConfigError("a network is needed: give --weights FILE, --network SPEC, or both")
    return build_network(network, image_size=image_size)
