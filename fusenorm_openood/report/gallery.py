"""Single images of a report: which ones, what they look like, and what objected to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusenorm_openood.data.transforms import Normalization
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.explanation import Explanation
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import DataError
from fusenorm_openood.report.content import Card, Cards, Facts, Picture
from fusenorm_openood.report.thumbnails import data_uri, overlaid, thumbnail, where

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
        tap = why.experts[max(rows, key=lambda row: float(why.objections[row, number]))]
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
