"""`fusenorm taps`: which layers of a network FuseNorm uses, and why."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fusenorm_openood.cli import options
from fusenorm_openood.errors import ConfigError, TapError
from fusenorm_openood.forward.taps import first_of_last_stage, kind_of
from fusenorm_openood.network import build_network, load_network, running, understanding
from fusenorm_openood.network.structure import Structure

_LINES = 40  # of the summary


def add_taps(parser: ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: recognised by the checkpoint's keys)"
    add("checkpoint", nargs="?", help="best.ckpt of a training run; without, random weights")
    spec = f"torchvision:NAME, timm:NAME or package.module:factory {default}"
    add("--network", "--arch", metavar="SPEC", help=spec)
    options.add(parser, "--weights-by-order")
    add("--all", action="store_true", help="list every module that can be a layer")
    size = "(default: the network's own, or 32 for a checkpoint without --network)"
    add("--image-size", type=options.positive, help=size)


def run_taps(args: Namespace) -> int:
    """Print the default layers, and with `--all` every module that can be one."""
    size = args.image_size
    if args.checkpoint is not None:
        net = load_network(args.checkpoint, None, args.network, size, args.weights_by_order)
        size = size or (None if args.network else 32)
    elif args.network is not None:
        net = build_network(args.network, image_size=size)
    else:
        raise ConfigError("taps needs a network: give a checkpoint, --network, or both")
    structure, images = _understood(net, size)
    blocks, layouts = structure.blocks, structure.layouts
    lines = [f"{type(net).__name__}, images {list(images.shape[1:])}", *_summary(structure), ""]
    lines.append("    module, class, layout, output shape for one image; * = layer by default")
    lines += [
        f"  {'*' if name in blocks else ' '} {name}, {kind_of(running.unwrapped(net), name)}, "
        f"{layouts[name]}, {list(structure.shapes[name][1:])}"
        for name in layouts
        if args.all or name in blocks
    ]
    if not args.all:
        more = len(layouts) - len(blocks) + max(len(lines) - _LINES + 1, 0)
        lines = [*lines[: _LINES - 1], f"    and {more} more: --all lists them"]
    print("\n".join(lines))
    return 0


def _summary(structure: Structure) -> Iterator[str]:
    blocks, stages = structure.blocks, structure.stages(structure.blocks)
    yield f"taps: {len(blocks) or 'none'}, found by {structure.rule}"
    listed = [f"{len(s)} of {structure.pixels[s[0]]} pixels" for s in stages[:8]]
    listed += ["..."] if stages[8:] else []
    yield f"stages: {len(stages)} ({', '.join(listed)})" if stages else "stages: none"
    if blocks:
        yield f"first block of the last stage: {first_of_last_stage(structure, blocks)}"
    yield f"head: {describe_head(structure)}"
    if structure.batch_dependent:
        yield "the images of a batch influence each other: a batch is never split"
    if structure.random:
        yield "it gives other logits for the same images in each pass: set random='allow'"
    if structure.activation:
        yield "it returns log-probabilities, whose energy is always 0: set output='msp'"
    if structure.smallest_batch > 1:
        yield "it cannot take one image alone: a copy is put beside it"
    for note in structure.notes:
        yield f"left out: {note}; name others with taps=[...]"


def describe_head(structure: Structure) -> str:
    """The layers that make the logits, and how."""
    head = structure.head
    if head.feature:
        side, name, *_ = head.feature
        divided = ", divided by its length" if head.is_normalised else ""
        return f"a linear function of the {side} of {name}{divided}"
    if not head.names:
        return "none found, so ReAct and most post-hoc experts cannot be used"
    if not head.before_softmax and head.is_linear and head.shares == (1.0,):
        return head.names[0]
    how = "what follows it is undone" if head.before_softmax else "their sum is the logits"
    if not head.is_linear:
        how = "the logits are no sum of its outputs, so ReAct runs twice"
    shares = ", ".join(f"{n} x {s:.3g}" for n, s in zip(head.names, head.shares, strict=True))
    return f"{shares} ({how})"


def _understood(net: nn.Module, size: int | None) -> tuple[Structure, Tensor]:
    """The structure of a network, and two images that it takes."""
    generator = torch.Generator().manual_seed(0)
    error: Exception | None = None
    for shape in _likely_shapes(running.unwrapped(net), size):
        images = torch.randn((2, *shape), generator=generator, dtype=torch.float32, device="cpu")
        try:
            return understanding.understand(net, images), images
        except TapError as failed:
            if size:
                raise
            error = failed
    raise ConfigError(
        f"{type(net).__name__} takes images of no usual size: give --image-size ({error})"
    )


def _likely_shapes(core: nn.Module, size: int | None) -> Iterator[tuple[int, ...]]:
    """Channels, height and width: what timm's and Hugging Face's networks say, then the usual."""
    config = getattr(core, "config", None)
    conv = next((m for m in core.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(config, "num_channels", None) or (conv.in_channels if conv else 3)
    if size:
        yield channels, size, size
        return
    patches = getattr(getattr(core, "patch_embed", None), "img_size", None)
    if isinstance(patches, tuple) and len(patches) == 2:
        yield channels, *patches
    if declared := (getattr(core, "default_cfg", None) or {}).get("input_size"):
        yield tuple(declared)
    if isinstance(side := getattr(config, "image_size", None), int):
        yield channels, side, side
    for side in (64, 32, 224, 28):
        yield channels, side, side
