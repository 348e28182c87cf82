"""Galleries of images, with what each expert contributes."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusenorm_openood.data.preprocessing import Normalization
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import Explanation
from fusenorm_openood.errors import DataError
from fusenorm_openood.report.page import Card, Cards, Facts, Picture

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


PER_GROUP = 4


class Chosen(NamedTuple):
    """An image to show.

    Attributes:
        name: its file.
        facts: what is known of it, its confidence for example.
        read: gives its tensor `[3, H, W]`; raises DataError if its file has gone.
    """

    name: str
    facts: Facts
    read: Callable[[], Tensor]


class Gallery(NamedTuple):
    """Cards of images, and by group the explanation of those that could be read."""

    cards: tuple[Cards, ...]
    explained: dict[str, Explanation]


def gallery(
    groups: Mapping[str, Sequence[Chosen]], detector: Detector, norm: Normalization
) -> Gallery:
    """The cards of groups of images; FuseNorm's have heat maps.

    Args:
        groups: images by the title of their group.
        detector: the detector that judged them.
        norm: how the tensors were normalised.
    """
    cards, explained = [], {}
    for title, images in groups.items():
        read = [_read(image) for image in images]
        tensors = [tensor for tensor in read if tensor is not None]
        why = None
        if tensors and isinstance(detector, FuseNorm):
            why = explained[title] = detector.explain(torch.stack(tensors))
        number, made = 0, []
        for image, tensor in zip(images, read, strict=True):
            made.append(_card(image, tensor, why, number, norm))
            number += tensor is not None
        if made:
            cards.append(Cards(title, tuple(made)))
    return Gallery(tuple(cards), explained)


def _read(image: Chosen) -> Tensor | None:
    try:
        return image.read()
    except DataError:
        return None


def _card(
    image: Chosen,
    tensor: Tensor | None,
    why: Explanation | None,
    number: int,
    norm: Normalization,
) -> Card:
    if tensor is None:
        return Card(image.name, (), image.facts, "Its file can no longer be read.")
    seen = thumbnail(tensor, norm)
    pictures = [Picture(data_uri(seen), f"{image.name} as the network sees it")]
    if why is None:
        return Card(image.name, tuple(pictures), image.facts)
    objected = why.objected[number]
    facts = (*image.facts, ("objected", objected))
    rows = [row for row, name in enumerate(why.experts) if name in why.maps]
    if not rows:
        return Card(image.name, tuple(pictures), facts)
    tap = objected
    if objected not in why.maps:
        tap = why.experts[max(rows, key=lambda row: float(why.below_mean[row, number]))]
    heat = why.maps[tap][number]
    pictures.append(
        Picture(
            data_uri(overlaid(seen, heat)),
            f"heat map of {tap} on {image.name}: most energy in the {where(heat)}",
        )
    )
    remark = f"Heat map: {tap}."
    if objected not in why.maps:
        remark = f"{objected} has no heat map; this is {tap}, the block that objected most."
    return Card(image.name, tuple(pictures), facts, remark)
