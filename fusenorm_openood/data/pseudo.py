"""Pseudo-OOD images, made from ID images: their content is destroyed, their statistics are not."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

GRID = 4  # tiles per side of a jigsaw


def jigsaw(images: Tensor, generator: Generator) -> Tensor:
    """Images cut into 4 x 4 tiles in a random order; rows and columns that do not fit stay."""
    B, _, H, W = images.shape
    h, w = H // GRID, W // GRID
    if 0 in (h, w):
        return rotation(images, generator)
    tiles = F.unfold(images[:, :, : h * GRID, : w * GRID], (h, w), stride=(h, w))
    drawn = torch.rand(B, 1, GRID**2, generator=generator, dtype=torch.float32, device="cpu")
    order = drawn.argsort(-1).to(images.device)
    shuffled = tiles.gather(2, order.expand_as(tiles))
    result = images.clone()
    size = (h * GRID, w * GRID)
    result[:, :, : size[0], : size[1]] = F.fold(shuffled, size, (h, w), stride=(h, w))
    return result


def blur(images: Tensor, generator: Generator) -> Tensor:
    """Images under a Gaussian blur of a standard deviation of an eighth of the shorter side."""
    from torchvision.transforms.v2 import functional as V  # takes a second to import

    sigma = min(images.shape[2:]) / 8
    reach = min(int(3 * sigma), min(images.shape[2:]) - 1)
    found: Tensor = V.gaussian_blur(images, [2 * reach + 1] * 2, [sigma, sigma])
    return found


def noise(images: Tensor, generator: Generator) -> Tensor:
    """Images with Gaussian noise of their own standard deviation."""
    shape = images.shape
    white = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(images)
    values = images.flatten(1)
    std = values.std(1, correction=min(1, values.shape[1] - 1))  # 0 for a single value
    return images + white * std.view(-1, 1, 1, 1)


def rotation(images: Tensor, generator: Generator) -> Tensor:
    """Images turned by a quarter, a half or three quarters; by a half if not square."""
    if images.shape[2] != images.shape[3]:
        return images.rot90(2, (2, 3))
    turns = torch.randint(1, 4, (len(images),), generator=generator, device="cpu").tolist()
    return torch.stack([image.rot90(k, (1, 2)) for image, k in zip(images, turns, strict=True)])


def inversion(images: Tensor, generator: Generator) -> Tensor:
    """Negatives: the darkest value of each image becomes its brightest."""
    low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    return low + high - images


def mixing(images: Tensor, generator: Generator) -> Tensor:
    """The mean of each image and the one before it in the batch; alone, with its mirror image."""
    other = images.roll(1, 0) if len(images) > 1 else images.flip(3)
    return (images + other) / 2


def zoom(images: Tensor, generator: Generator) -> Tensor:
    """The centre of each image, a quarter of its height and width, enlarged to full size."""
    H, W = images.shape[2:]
    h, w = max(H // 4, 1), max(W // 4, 1)
    top, left = (H - h) // 2, (W - w) // 2
    part = images[:, :, top : top + h, left : left + w]
    return F.interpolate(part, (H, W), mode="bilinear", antialias=False)


KINDS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    kind.__name__: kind for kind in (jigsaw, blur, noise, rotation, inversion, mixing, zoom)
}
RANDOM = ("jigsaw", "noise", "rotation")  # they draw, as much as the shape of the images says
