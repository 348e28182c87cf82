"""`fusenorm taps`: what FuseNorm taps in a network, and why."""

from argparse import ArgumentParser, Namespace

from fusenorm_openood.cli import options
from fusenorm_openood.networks import load_network


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="best.ckpt of a training run")
    parser.add_argument("--image-size", type=options.positive, default=32, help="(default: 32)")


def run(args: Namespace) -> int:
    """Print every module that returns one feature map, and mark those tapped by default."""
    net = load_network(args.checkpoint)
    return 0
