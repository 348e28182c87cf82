"""The detector and the network that a command line names."""

import re
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from torch import nn

from fusenorm_openood.cli import options
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.saving import read_source
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.network import build_network, load_network
from fusenorm_openood.network.named import is_catalogued

_NOT_LOCAL = re.compile(r"[\\/]{2}|[A-Za-z][A-Za-z0-9+.-]+:")  # URLs, network shares


def add_detector(parser: ArgumentParser) -> None:
    """`--detector`, `--network` and `--weights`: what `load_detector` loads."""
    add = parser.add_argument
    add("--detector", required=True, metavar="FILE", help="what `fusenorm fit` has saved")
    options.add_network(parser)
    options.add_bits(parser)
    add("--weights", metavar="FILE", help="checkpoint (default: where `fit` found it)")


def load_detector(args: Namespace) -> FuseNorm:
    """The detector, with the network that is given, or the one that `fit` had.

    A file may come from others, so that it names no code: of the network in it only the name of an
    architecture of torchvision or timm is followed, and a path of weights on this machine.

    Raises:
        DetectorFileError: a file that cannot be read, or another network.
        CheckpointError, ConfigError: a network that cannot be loaded, or that must be given.
    """
    device = own_device(args.device)
    source = read_source(Path(args.detector))
    spec, weights, size = args.network, args.weights, source.image_size
    if spec is None and source.network is not None:
        spec = source.network
        if not is_catalogued(spec):
            raise ConfigError(
                f"detector file {args.detector} names the network {spec!r}, and no file is trusted "
                "to name code: if you trust it yourself, give it with --network"
            )
    if weights is None and source.weights is not None:
        weights = source.weights
        if _NOT_LOCAL.match(weights):
            raise ConfigError(
                f"detector file {args.detector} names the weights {weights!r}, which are not on "
                "this machine: give a checkpoint with --weights"
            )
    net = source_network(spec, weights, None if size is None else int(size))
    detector = FuseNorm.load(args.detector, net.to(device))
    if args.bits is not None:
        detector.preprocessing = replace(detector.known_preprocessing(), bits=args.bits)
    return detector


def source_network(spec: str | None, weights: str | None, image_size: int | None) -> nn.Module:
    """The network of `--network` and `--weights`.

    Raises:
        ConfigError: neither of the two.
        CheckpointError: a checkpoint that cannot be loaded.
    """
    if weights is not None:
        return load_network(weights, network=spec, image_size=image_size)
    if spec is None:
        raise ConfigError("a network is needed: give --weights FILE, --network SPEC, or both")
    return build_network(spec, image_size=image_size)
