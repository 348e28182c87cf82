"""Galleries of images, with what each expert contributes."""

import base64
import heapq
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from html import escape
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fusenorm_openood.data.preprocessing import Normalization
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import Explanation
from fusenorm_openood.errors import DataError
from fusenorm_openood.report.page import ENCODED, Card, Facts, Rows
from fusenorm_openood.report.plots import FEW, lowest_layer, overlaid, where

SIDE = 128  # pixels of the longer side, at most
LISTED = 96  # of the pictures in a list
PER_GROUP = 4
ROWS, PICTURES = 800_000, 3_500_000  # bytes of the rows and the pictures of a list, at most
CHOOSE = frozenset(("verdict", "data set", "predicted", "lowest contribution"))
REJECTED, DOUBTFUL, TRUSTED = "Most rejected", "Most doubtful", "Most trusted"


def choose(
    images: Iterable[Any],
    cut: Callable[[Any], float] | None,
    most: int = PER_GROUP,
    chosen: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, list[Any]]:
    """Images with the smallest `confidence`, those closest to the threshold, and the largest ones.

    `most` of each, also from those that were `chosen` from earlier images. `cut` gives an image's
    threshold.
    """
    images, chosen = list(images), chosen or {}
    order: dict[str, Callable[[Any], float]] = {REJECTED: lambda image: image.confidence}
    if cut is not None:
        order[DOUBTFUL] = lambda image: abs(image.confidence - cut(image))
    order[TRUSTED] = lambda image: -image.confidence
    return {
        name: heapq.nsmallest(most, [*chosen.get(name, ()), *images], key)
        for name, key in order.items()
    }


def varied(
    images: Iterable[Any], kinds: Callable[[Any], Iterable[Any]], most: int = PER_GROUP
) -> list[Any]:
    """The first images, each as different in its `kinds` from those before it as can be."""
    left, chosen, seen = list(images), list[Any](), Counter[Any]()
    while left and len(chosen) < most:
        number = min(range(len(left)), key=lambda n: sum(seen[k] for k in kinds(left[n])))
        chosen.append(left.pop(number))
        seen.update(kinds(chosen[-1]))
    return chosen


class Shown(NamedTuple):
    """An image to show: its file, facts such as its confidence, and how it is read.

    `read` gives its tensor `[C, H, W]`, or raises DataError if its file has gone.
    """

    name: str
    facts: Facts
    read: Callable[[], Tensor]
    link: str = ""


def gallery(
    groups: Mapping[str, Sequence[Shown]],
    detector: Detector,
    norm: Normalization,
    channels: Sequence[int] | None = None,
) -> tuple[tuple[tuple[str, tuple[Card, ...]], ...], dict[str, Explanation]]:
    """Cards by title, and the explanations of images that can be read; FuseNorm has heat maps."""
    galleries, explained = [], {}
    for title, images in groups.items():
        tensors = dict[int, Tensor]()  # of those whose files can still be read
        for position, image in enumerate(images):
            if (tensor := _read(image)) is not None:
                tensors[position] = tensor
        why = None
        if tensors and isinstance(detector, FuseNorm):
            why = explained[title] = detector.explain(torch.stack([*tensors.values()]))
        cards = [Card(i.name, (), i.facts, "Its file can no longer be read.") for i in images]
        for number, (position, tensor) in enumerate(tensors.items()):
            picture = thumbnail(tensor, norm, channels)
            cards[position] = _card(images[position], picture, why, number)
        if cards:
            galleries.append((title, tuple(cards)))
    return tuple(galleries), explained


def _read(image: Shown) -> Tensor | None:
    """Its tensor, None if its file has gone; warnings of the file came when it was judged."""
    with suppress(DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return image.read()
    return None


def _card(image: Shown, picture: Image.Image, why: Explanation | None, number: int) -> Card:
    pictures = ((data_uri(picture), f"{image.name} as the network sees it"),)
    if why is None:
        return Card(image.name, pictures, image.facts, link=image.link)
    objected = why.objected[number]
    facts = (*image.facts, ("lowest contribution", objected))
    if not why.maps:
        return Card(image.name, pictures, facts, link=image.link)
    layer, remark = objected, f"Heat map: {objected}."
    if objected not in why.maps:
        layer = lowest_layer(why, number)
        remark = (
            f"{objected} has no heat map; this is {layer}, the layer with the lowest contribution."
        )
    heat = why.maps[layer][number]
    alt = f"heat map of {layer} on {image.name}: most energy in the {where(heat)}"
    heated = (data_uri(overlaid(picture, heat)), alt)
    return Card(image.name, (*pictures, heated), facts, remark, image.link)


def thumbnail(
    image: Tensor, norm: Normalization, channels: Sequence[int] | None = None, side: int = SIDE
) -> Image.Image:
    """A small picture of a normalised tensor `[C, H, W]`; see `Preprocessing.shown`."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu").view(-1, 1, 1) for v in norm)
    unit = (image.detach().cpu().float() * std + mean).clamp(0, 1)
    if channels is not None:
        unit = unit[list(channels)]
    elif len(unit) != 3:
        unit = unit.mean(0, keepdim=True)
    pixels = unit.mul(255).round().byte().expand(3, -1, -1)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    return picture


def listed(
    images: Iterable[Shown],
    number: int,
    order: str,
    norm: Normalization,
    channels: Sequence[int] | None = None,
    room: int = PICTURES,
) -> Rows:
    """The rows of images, of this `number` in all, as many as fit into the page.

    The first have pictures, of `room` bytes in all. `order` says which those are.
    """
    left, cards, shown = ROWS, list[Card](), list[Shown]()
    for image in images:
        cards.append(Card(image.name, (), image.facts, link=image.link))
        shown.append(image)
        left -= 200 + len(escape(f"{cards[-1]}").encode(*ENCODED))
        if left < 0:
            break
    for n, image in enumerate(shown):
        if (tensor := _read(image)) is None:
            continue
        uri = data_uri(thumbnail(tensor, norm, channels, LISTED), quality=70)
        room -= len(uri)
        if room < 0:
            break
        cards[n] = cards[n]._replace(pictures=((uri, ""),))
    which = "All" if len(cards) == number else f"{len(cards):,} of {number:,}"
    return Rows(f"{which} images, {order}", CHOOSE, tuple(cards))


def data_uri(picture: Image.Image, quality: int = 82) -> str:
    """A picture as a data URI: PNG if it has few pixels, else JPEG."""
    file, few = io.BytesIO(), max(picture.size) <= FEW
    if few:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=quality)
    kind = "png" if few else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
