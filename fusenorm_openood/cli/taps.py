"""`fusenorm taps`: what FuseNorm taps in a network, and why."""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.cli import options
from fusenorm_openood.errors import ConfigError, TapError
from fusenorm_openood.forward.hooks import first_of_last_stage, kind_of
from fusenorm_openood.network import build_network, load_network
from fusenorm_openood.network.running import unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand

_LINES = 40  # of the summary


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", help="best.ckpt of a training run; without, random weights")
    add(
        "--network",
        "--arch",
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME or package.module:factory (default: recognised by the "
        "checkpoint's keys)",
    )
    add("--all", action="store_true", help="list every module that can be tapped")
    add(
        "--image-size",
        type=options.positive,
        help="(default: the network's own, or 32 for a checkpoint without --network)",
    )


def run(args: Namespace) -> int:
    """Print the modules that are tapped by default, and with `--all` every one that can be."""
    net, images = _network(args)
    structure, core = understand(net, images), unwrapped(net)
    blocks, stages = structure.blocks, structure.stages(structure.blocks)
    lines = [f"{type(net).__name__}, images {list(images.shape[1:])}"]
    lines.append(f"taps: {len(blocks) or 'none'}, found by {structure.rule}")
    listed = ", ".join(f"{len(s)} of {structure.pixels[s[0]]} pixels" for s in stages[:8])
    listed += ", ..." if stages[8:] else ""
    lines.append(f"stages: {len(stages)} ({listed})" if stages else "stages: none")
    if blocks:
        lines.append(f"strong block: {first_of_last_stage(structure, blocks)}")
    lines.append(f"head: {_head(structure)}")
    if structure.batch_dependent:
        lines.append("the images of a batch influence each other: a batch is never split")
    if structure.random:
        lines.append("it gives other logits for the same images in each pass: set random='allow'")
    if structure.activation:
        lines.append("it returns log-probabilities, whose energy is always 0: set output='msp'")
    if structure.smallest_batch > 1:
        lines.append("it cannot take one image alone: a copy is put beside it")
    lines += [f"left out: {note}; name others with taps=[...]" for note in structure.notes]
    lines += ["", "    module, class, layout, output shape for one image; * = tapped by default"]
    shown = structure.layouts if args.all else blocks
    lines += [
        f"  {'*' if name in blocks else ' '} {name}, {kind_of(core, name)}, "
        f"{structure.layouts[name]}, {list(structure.shapes[name][1:])}"
        for name in structure.layouts
        if name in shown
    ]
    if not args.all:
        more = len(structure.layouts) - len(blocks) + max(len(lines) - _LINES + 1, 0)
        lines = [*lines[: _LINES - 1], f"    and {more} more: --all lists them"]
    print("\n".join(lines))
    return 0


def _head(structure: Structure) -> str:
    head = structure.head
    if head.feature:
        side, name, *_ = head.feature
        divided = ", divided by its length" if head.is_normalised else ""
        return f"a linear function of the {side} of {name}{divided}"
    if not head.names:
        return "none found, so ReAct and most post-hoc experts cannot be used"
    how = "what follows it is undone" if head.before_softmax else "their sum is the logits"
    shares = ", ".join(f"{n} x {s:.3g}" for n, s in zip(head.names, head.shares, strict=True))
    if head.before_softmax or not head.is_linear or head.shares != (1.0,):
        how = how if head.is_linear else "the logits are no sum of its outputs, so ReAct runs twice"
        return f"{shares} ({how})"
    return head.names[0]


def _network(args: Namespace) -> tuple[nn.Module, Tensor]:
    """The network, and two images that it takes."""
    if args.checkpoint is None and args.network is None:
        raise ConfigError("taps needs a network: give a checkpoint, --network, or both")
    size = args.image_size
    if args.checkpoint is None:
        net = build_network(args.network, image_size=size)
    else:
        net = load_network(args.checkpoint, network=args.network, image_size=size)
        size = size or (None if args.network else 32)
    generator = torch.Generator().manual_seed(0)
    error: Exception | None = None
    for channels, height, width in _likely_shapes(unwrapped(net), size):
        shape = (2, channels, height, width)
        images = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        try:
            understand(net, images)
        except TapError as failed:
            if size:
                raise
            error = failed
            continue
        return net, images
    raise ConfigError(
        f"{type(net).__name__} takes images of no usual size: give --image-size ({error})"
    )


def _likely_shapes(core: nn.Module, size: int | None) -> list[tuple[int, int, int]]:
    """Channels, height and width: what timm's and Hugging Face's networks say, then the usual."""
    declared: Any = (getattr(core, "default_cfg", None) or {}).get("input_size")
    config: Any = getattr(core, "config", None)
    conv = next((m for m in core.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(config, "num_channels", None) or (conv.in_channels if conv else 3)
    if size:
        return [(channels, size, size)]
    patches: Any = getattr(getattr(core, "patch_embed", None), "img_size", None)
    likely = [(channels, *patches)] if isinstance(patches, tuple) and len(patches) == 2 else []
    likely += [tuple(declared)] if declared else []
    declared = getattr(config, "image_size", None)
    likely += [(channels, declared, declared)] if isinstance(declared, int) else []
    return [*likely, *((channels, s, s) for s in (64, 32, 224, 28))]
