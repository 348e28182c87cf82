"""The detector and the network that a command line names."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from torch import nn

from fusenorm_openood.cli import options
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.storage import read_contents
from fusenorm_openood.devices import own_device
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.networks import build_network, load_network


def add_detector(parser: ArgumentParser) -> None:
    """`--detector`, `--network` and `--weights`: what `load_detector` loads."""
    add = parser.add_argument
    add("--detector", required=True, metavar="FILE", help="what `fusenorm fit` has saved")
    options.add_network(parser)
    options.add_bits(parser)
    add("--weights", metavar="FILE", help="checkpoint (default: where `fit` found it)")


def load_detector(args: Namespace) -> FuseNorm:
    """The detector, with the network that `fit` had, or the one that is given.

    Raises:
        DetectorFileError: a file that cannot be read, or another network.
        CheckpointError, ConfigError: a network that cannot be loaded.
    """
    device = own_device(args.device)
    source = read_contents(Path(args.detector)).record.get("source") or {}
    size = source.get("image_size")
    net = source_network(
        args.network or source.get("network"),
        args.weights or source.get("weights"),
        None if size is None else int(size),
    )
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
