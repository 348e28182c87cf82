"""The axes of feature maps: channels first, channels last, or tokens."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from torch import Tensor, nn

from fusenorm_openood.structure.recording import Call

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
    """Prefix tokens, height and width of tokens of images `[H, W]`.

    Prefix tokens are no patches, such as class tokens and registers: the smallest usual number
    that leaves a grid of exactly the image's aspect, else the smallest that leaves one up to
    rounding.

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
    """The layout of a module's output for a batch of images of a shape; `""` if it is no map.

    Where the image's aspect does not decide between height and width first or last, the layers do
    that read the module's output, its input, or work inside it.
    """
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
    found = (_layout_of_layer(modules[layer]) for layer in _layers_around(name, calls))
    return next(filter(None, found), "BCHW")


def _layers_around(name: str, calls: Mapping[str, Call]) -> Iterator[str]:
    call = calls[name]
    maps = {n: c for n, c in calls.items() if len(c.given) == 4 or len(c.shape) == 4}
    for node in (call.left, *call.entered):
        yield from (n for n, c in maps.items() if node is not None and node in c.entered)
    yield from (n for n in reversed(maps) if n == name or n.startswith(f"{name}."))


def _layout_of_layer(layer: nn.Module) -> str | None:
    if type(layer).__name__.endswith("2d") or isinstance(layer, nn.GroupNorm):
        return "BCHW"  # Conv2d, BatchNorm2d, LayerNorm2d, ...
    return "BHWC" if type(layer) in (nn.Linear, nn.LayerNorm) else None


def pixels(shape: Sequence[int], layout: str, image: Sequence[int]) -> int:
    """Number of pixels of a feature map, without prefix tokens."""
    if "N" in layout:
        _, height, width = token_grid(shape[layout.index("N")], (image[-2], image[-1]))
        return height * width
    return shape[layout.index("H")] * shape[layout.index("W")]


def as_maps(x: Tensor, layout: str, image: Sequence[int]) -> Tensor:
    """A view `[B, C, H, W]` of a feature map; of tokens without their prefix, on their grid."""
    if layout == "BCHW":
        return x
    if layout == "BHWC":
        return x.permute(0, 3, 1, 2)
    tokens = x if layout == "BNC" else x.transpose(0, 1)
    prefix, height, width = token_grid(tokens.shape[1], (image[-2], image[-1]))
    return tokens[:, prefix:].mT.view(*tokens.mT.shape[:2], height, width)
