"""Sections that several reports share, and what they say about a detector."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.method.conformal import EQUAL, guarantee, needed_images
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import unwrapped
from fusenorm_openood.report.charts import Series, acceptance_curves, bars
from fusenorm_openood.report.page import Facts, Section, Table

GROUPS = {"nearood": "near-OOD", "farood": "far-OOD", "valood": "validation OOD"}
HEAT = "a heat map of the energy that a block's norm comes from (dark blue = none, yellow = most)"
ENDS = "The outermost bins also hold all images beyond them."


def detector_facts(detector: Detector) -> Facts:
    """What a detector and its network are."""
    facts = [
        ("detector", type(detector).__name__),
        ("network", type(unwrapped(detector.net)).__name__),
    ]
    if isinstance(detector, FuseNorm):
        changed = {k: v for k, v in asdict(detector.settings).items() if v != _DEFAULTS[k]}
        said = ", ".join(f"{key} = {value}" for key, value in changed.items())
        facts += [("settings", said or "default"), ("strong experts", ", ".join(detector.strong))]
        weak = [name for name in detector.experts if name not in detector.strong]
        facts.append(("other blocks", ", ".join(weak) or "none"))
        if detector.calibration_ is not None:
            facts.append(("fitted on", f"{detector.calibration_.id_scores.shape[1]:,} ID images"))
        if detector.reference_ is not None:
            facts.append(("calibrated on", f"{len(detector.reference_):,} other ID images"))
    return tuple(facts)


_DEFAULTS = asdict(Settings())


def threshold(reference: NDArray[Any] | None, share: float) -> float | None:
    """The smallest confidence that is accepted at an acceptance, None without enough images."""
    if reference is None or len(reference) < needed_images(share):
        return None
    k = math.floor((1 - share + EQUAL) * (len(reference) + 1))
    return float(np.sort(reference)[k - 1])


def acceptance_section(
    images: int, known: Series | None, others: Sequence[Series], asked: float, where_from: str
) -> Section:
    """Acceptance against rejection, with what is guaranteed; the series are p-values."""
    promised = guarantee(images, asked)
    text = f"{where_from} At an acceptance of {asked:.0%}, {promised}."
    title = "Share of the images by the acceptance asked for"
    figure = acceptance_curves(title, images, known, others, asked)
    return Section(
        "Acceptance and rejection",
        (
            text[0].upper() + text[1:],
            "The band is where the accepted share of ID images lies with a probability of 95% "
            "(Beta distribution); between the dotted lines it lies at all acceptances at once "
            "(Dvoretzky, Kiefer, Wolfowitz). Both hold for ID images like the calibration images.",
        ),
        figures=(figure,),
    )


def objections_section(
    experts: Sequence[str], counts: Mapping[str, Mapping[str, int]]
) -> list[Section]:
    """Which expert objected most to rejected images, by group; none without such images."""
    shares = {
        group: {name: 100 * count.get(name, 0) / sum(count.values()) for name in experts}
        for group, count in counts.items()
        if sum(count.values())
    }
    if not shares:
        return []
    numbers = ", ".join(f"{sum(counts[group].values()):,} {group}" for group in shares)
    text = (
        f"For each rejected image ({numbers}), the expert whose share in the confidence is "
        "furthest below its mean over ID images. Blocks are in the network's order."
    )
    figure = bars("Expert that objected most", shares, "% of the rejected images")
    return [Section("Objections by layer", (text,), figures=(figure,))]


def objected(detector: FuseNorm, scores: NDArray[Any]) -> list[str]:
    """The expert that objects most to each image, from the experts' scores `[L, N]`."""
    calibration = detector._check_fitted()
    _, shares = calibration.normalised_and_shares(scores[: len(calibration.experts)])
    worst = (calibration.mean_shares - shares).argmax(axis=0)
    return [calibration.experts[row] for row in worst]


def table_of(
    frame: pd.DataFrame, caption: str, corner: str, best: Mapping[Any, bool] = {}
) -> Table:
    """A table of a data frame; `best` has the columns of numbers whose largest cell is marked."""
    rows = [
        (_name(name), *map(_cell, row))
        for name, row in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    marked = set()
    for number, column in enumerate(frame.columns, start=1):
        if column in best:
            values = frame[column].to_numpy(float).round(2)
            top = values.max() if best[column] else values.min()
            marked |= {(int(row), number) for row in np.flatnonzero(values == top)}
    columns = (corner, *map(_name, frame.columns))
    return Table(caption, columns, tuple(rows), frozenset(map(_name, GROUPS)), frozenset(marked))


def _name(name: Any) -> str:
    """How a row or a column is called; a group's has its mean."""
    if name in GROUPS:
        return f"{GROUPS[name]} mean"
    first, *rest = str(name).split(" ")
    return " ".join((GROUPS.get(first, first), *rest))


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
