"""The axes of feature maps: channels first, channels last, or tokens."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusenorm_openood.network.graph import INPUT, Call, Node

# A letter for each dimension: batch, channels, height, width, tokens.
LAYOUTS = ("BCHW", "BHWC", "BNC", "NBC")
USUAL_PREFIX = 16  # one class token, one for distillation, a few registers


def fits(height: int, width: int, image: Sequence[int], exactly: bool = False) -> bool:
    """Whether a grid has an image's aspect, up to the rounding of strides and patches."""
    tall, wide = image[-2:]
    off = abs(height * wide - width * tall)
    return off == 0 if exactly else off < max(tall, wide)


@cache
def token_grid(tokens: int, image: tuple[int, int]) -> tuple[int, int, int]:
    """Number of prefix tokens, and height and width of the other tokens, of images `[H, W]`.

    The smallest usual number that leaves a grid of exactly the image's aspect, else the smallest
    that leaves one up to rounding.

    >>> token_grid(197, (224, 224)), token_grid(201, (224, 224)), token_grid(24, (64, 96))
    ((1, 14, 14), (5, 14, 14), (0, 4, 6))
    """
    for exactly, most in ((True, min(tokens, USUAL_PREFIX + 1)), (False, tokens)):
        for prefix in range(most):
            left = tokens - prefix
            for height in range(1, left + 1):
                if left % height == 0 and fits(height, left // height, image, exactly):
                    return prefix, height, left // height
    return 0, tokens, 1


def find_layout(
    name: str, calls: Mapping[str, Call], modules: Mapping[str, nn.Module], image: Sequence[int]
) -> str:
    """The layout of a module's output for a batch of images of a shape; `""` if it is no map."""
    shape, batch = calls[name].shape, image[0]
    if 0 in shape or len(shape) not in (3, 4):
        return ""
    if len(shape) == 3:
        return "BNC" if shape[0] == batch else "NBC" if shape[1] == batch else ""
    if shape[0] != batch:
        return ""
    first, last = fits(shape[2], shape[3], image), fits(shape[1], shape[2], image)
    if first != last:
        return "BCHW" if first else "BHWC"
    # The image's aspect does not decide: the layers do that read the output, its input, or work
    # inside the module.
    maps = {
        n: c
        for n, c in calls.items()
        if not n.endswith(INPUT) and (len(c.shape) == 4 or (c.took and len(c.took.shape) == 4))
    }
    nodes = [node for node in (calls[name].left, *calls[name].entered) if node is not None]
    around = [n for node in nodes for n, c in maps.items() if node in c.entered]
    around += [n for n in reversed(maps) if n == name or n.startswith(f"{name}.")]
    for kind in (type(modules[layer]) for layer in around):
        if kind.__name__.endswith("2d") or issubclass(kind, nn.GroupNorm):
            return "BCHW"  # Conv2d, BatchNorm2d, LayerNorm2d, ...
        if kind in (nn.Linear, nn.LayerNorm):
            return "BHWC"
    return "BCHW"


class Prefix(NamedTuple):
    """Tokens that are no pixels, such as class tokens and registers."""

    length: int
    place: float = 0.0  # part of the other tokens that stand before them


def find_prefixes(
    calls: Mapping[str, Call],
    layouts: Mapping[str, str],
    trunk: Mapping[Node, int],
    image: Sequence[int],
) -> dict[str, Prefix]:
    """The prefix tokens of the modules that return tokens, as far as the graph shows them."""
    # On the way from the images to the logits, a feature map or the first tokens have as many
    # pixels as patches; tokens that join them later, and are the same for both images, are no
    # pixels. What drops or merges tokens does so to pixels.
    values = [(c.gave[c.index], layouts.get(n, ""), n) for n, c in calls.items() if c.gave]
    values += [(c.took, "BNC", "") for c in calls.values() if c.took and len(c.took.shape) == 3]
    on_trunk = [value for value in values if value[0].node in trunk]
    patches, now, found = 0, Prefix(0), dict[str, Prefix]()
    for value, layout, name in sorted(on_trunk, key=lambda value: -trunk[value[0].node]):
        shape = value.shape
        if layout in ("BCHW", "BHWC"):
            patches, now = pixels(shape, layout, image), Prefix(0)
        elif layout and image[0] in shape[:2]:
            tokens = shape[1] if shape[0] == image[0] else shape[0]
            guess, more = token_grid(tokens, (image[-2], image[-1]))[0], tokens - patches
            if more == 0 or not patches:
                patches, now = tokens, Prefix(0)
            elif more != now.length:
                if 0 < more <= patches:  # some tokens have joined the patches
                    now = _find_equal(value.alike, more) or Prefix(more if more == guess else 0)
                elif more < 0 and guess and not now.length:
                    now = _find_equal(value.alike, guess) or now
                now = now if now.length < tokens else Prefix(0)
                patches = tokens - now.length
        if name and "N" in layout:
            found[name] = now
    return found


def _find_equal(alike: Tensor | None, count: int) -> Prefix | None:
    """The first place where so many tokens in a row are equal for both images."""
    if alike is None or alike.all():
        return None
    others = len(alike) - count
    start = next((s for s in range(others + 1) if alike[s : s + count].all()), None)
    if start is None:
        return None
    # In the middle exactly, also for images of other sizes, where a share of them is rounded.
    return Prefix(count, 0.5 if start == others // 2 > 0 else start / others)


def pixels(
    shape: Sequence[int], layout: str, image: Sequence[int], prefix: Prefix | None = None
) -> int:
    """Number of pixels of a feature map, without prefix tokens."""
    if "N" in layout:
        tokens = shape[layout.index("N")]
        skipped = token_grid(tokens, (image[-2], image[-1]))[0] if prefix is None else prefix.length
        return tokens - skipped
    return shape[layout.index("H")] * shape[layout.index("W")]


def as_maps(x: Tensor, layout: str, image: Sequence[int], prefix: Prefix | None = None) -> Tensor:
    """A view `[B, C, H, W]` of a feature map; of tokens without their prefix, on their grid."""
    if layout == "BCHW":
        return x
    if layout == "BHWC":
        return x.permute(0, 3, 1, 2)
    tokens = x if layout == "BNC" else x.transpose(0, 1)
    skipped, height, width = token_grid(tokens.shape[1], (image[-2], image[-1]))
    if prefix is None or prefix == (skipped, 0):
        left = tokens[:, skipped:]
    else:
        start = int(prefix.place * (tokens.shape[1] - prefix.length) + 1e-6)
        left = tokens[:, start + prefix.length :]
        left = torch.cat([tokens[:, :start], left], dim=1) if start else left
        skipped, height, width = token_grid(left.shape[1], (image[-2], image[-1]))
        height, width = (left.shape[1], 1) if skipped else (height, width)
    return left.mT.view(*tokens.mT.shape[:2], height, width)
