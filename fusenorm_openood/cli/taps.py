"""`fusenorm taps`: the modules of a checkpoint's network that can be tapped."""

from argparse import ArgumentParser, Namespace

import torch

from fusenorm_openood.cli import options
from fusenorm_openood.listening.taps import resolve_taps, tap_candidates
from fusenorm_openood.networks import load_network


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="best.ckpt of a training run")
    parser.add_argument("--image-size", type=options.positive, default=32, help="(default: 32)")


def run(args: Namespace) -> int:
    """Print every module that returns one feature map, and mark those tapped by default."""
    net = load_network(args.checkpoint)
    default = resolve_taps(net, "blocks")
    images = torch.zeros(1, 3, args.image_size, args.image_size)
    print("    module, class, output shape for one image; * = tapped by default")
    for name, kind, shape in tap_candidates(net, images):
        print(f"  {'*' if name in default else ' '} {name}, {kind}, {list(shape[1:])}")
    return 0
