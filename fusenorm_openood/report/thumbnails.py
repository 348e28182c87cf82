"""Small pictures as data URIs: images as a network sees them, and their heat maps."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusenorm_openood.data.transforms import Normalization

SIDE = 128  # pixels of the longer side, at most
FEW = 64  # pixels of the longer side up to which nothing is lost


def thumbnail(image: Tensor, norm: Normalization) -> Image.Image:
    """A small picture of a normalised tensor `[3, H, W]`."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu").view(-1, 1, 1) for v in norm)
    pixels = (image.detach().cpu().float() * std + mean).clamp(0, 1).mul(255).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture


def overlaid(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A picture in grey under its heat map `[H, W]`, in cividis from dark (none) to yellow."""
    from matplotlib import colormaps

    values = heat.detach().cpu().float().numpy()
    scaled = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    size = (max(picture.width, FEW), max(picture.height, FEW))
    smooth = Image.fromarray((255 * scaled).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    colours = colormaps["cividis"](np.asarray(smooth) / 255.0)[..., :3]
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.NEAREST)) / 255.0
    mixed = 0.35 * grey[..., None] + 0.65 * colours
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def where(heat: Tensor) -> str:
    """In which part of an image a heat map `[H, W]` is largest."""
    height, width = heat.shape
    row, column = divmod(int(heat.argmax()), width)
    up = ("upper", "middle", "lower")[_third(row, height)]
    side = ("left", "centre", "right")[_third(column, width)]
    return "centre" if (up, side) == ("middle", "centre") else f"{up} {side}"


def _third(place: int, length: int) -> int:
    return int(3 * (place + 0.5) / length)


def data_uri(picture: Image.Image) -> str:
    """A picture as a data URI: PNG if it has few pixels, else JPEG."""
    file, few = io.BytesIO(), max(picture.size) <= FEW
    if few:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=82)
    kind = "png" if few else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
