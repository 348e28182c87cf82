"""The report of judged image files."""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import DataError
from fusenorm_openood.method.conformal import check_enough, conformal_p_values, rejects
from fusenorm_openood.report.charts import Series, histogram
from fusenorm_openood.report.gallery import PER_GROUP, Chosen, Gallery, gallery
from fusenorm_openood.report.page import Facts, Report, Section, Table
from fusenorm_openood.report.sections import (
    ENDS,
    HEAT,
    acceptance_section,
    detector_facts,
    objections_section,
    threshold,
)

CHUNK = 10_000  # rows that are looked at together
FAULTY = 10  # unreadable files that are kept
REJECTED, DOUBTFUL, TRUSTED = "Most rejected", "Most doubtful", "Most trusted"


@dataclass
class Selection:
    """What is kept of judged files.

    Attributes:
        confidences: confidences `[N]` of the readable files.
        objected: number of rejected files by the expert that objected most.
        rejected: number of rejected files.
        unreadable: number of unreadable files.
        faulty: the first unreadable files.
        chosen: readable files to show, by group; a file is in one group only.
    """

    confidences: "array[float]" = field(default_factory=lambda: array("d"))
    objected: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    unreadable: int = 0
    faulty: list[Judged] = field(default_factory=list)
    chosen: dict[str, list[Judged]] = field(default_factory=dict)


def select(
    rows: Iterable[Judged],
    reference: NDArray[np.float64] | None,
    acceptance: float,
    cut: float | None,
    per_group: int,
) -> Selection:
    """Look at rows once, and keep little of them.

    Args:
        rows: the judgements.
        reference: confidences of the calibration images; None = no verdicts.
        acceptance: share of ID images to accept.
        cut: the threshold of the confidence at this acceptance.
        per_group: number of files to choose for each group.

    Raises:
        DataError: the p-values are not those of this detector.
    """
    seen, rows = Selection(), iter(rows)
    nearest: dict[str, Callable[[Judged], float]] = {
        REJECTED: _confidence,
        TRUSTED: lambda row: -_confidence(row),
    }
    if cut is not None:
        nearest[DOUBTFUL] = lambda row: abs(_confidence(row) - cut)
    kept: dict[str, list[Judged]] = {name: [] for name in nearest}
    while chunk := list(islice(rows, CHUNK)):
        faulty = [row for row in chunk if row.confidence is None]
        seen.unreadable += len(faulty)
        seen.faulty += faulty[: FAULTY - len(seen.faulty)]
        judged = [row for row in chunk if row.confidence is not None]
        conf = np.array([row.confidence for row in judged], np.float64)
        seen.confidences.extend(conf)
        ood = np.zeros(len(judged), bool)
        if reference is not None:
            p = conformal_p_values(conf, reference)
            _check_p_values(judged, p)
            ood = rejects(p, acceptance)
        seen.rejected += int(ood.sum())
        seen.objected.update(
            row.objected for row, out in zip(judged, ood, strict=True) if out and row.objected
        )
        for name, distance in nearest.items():
            wanted = judged
            if reference is not None and name != DOUBTFUL:
                wanted = [
                    r for r, out in zip(judged, ood, strict=True) if out == (name == REJECTED)
                ]
            # Some may be in another group already.
            kept[name] = heapq.nsmallest(3 * per_group, [*kept[name], *wanted], key=distance)
    taken: set[str] = set()
    for name in kept:
        free = [row for row in kept[name] if row.path not in taken][:per_group]
        taken.update(row.path for row in free)
        seen.chosen[name] = free
    order = (REJECTED, DOUBTFUL, TRUSTED)
    seen.chosen = {name: seen.chosen[name] for name in order if seen.chosen.get(name)}
    return seen


def _confidence(row: Judged) -> float:
    assert row.confidence is not None  # of a readable file
    return row.confidence


def _check_p_values(judged: list[Judged], p: NDArray[Any]) -> None:
    for row, value in zip(judged, p, strict=True):
        if row.p_value is not None and abs(row.p_value - value) > 1e-6:
            raise DataError(
                f"{row.path} was judged by another detector: its p-value is {row.p_value:g}, with "
                f"this one it is {value:g}: give the detector that judged it, or score again"
            )


def report_of_files(
    detector: FuseNorm,
    rows: Iterable[Judged],
    acceptance: float = 0.95,
    facts: Facts = (),
    per_group: int = PER_GROUP,
) -> Report:
    """The report about judged files; only the images of its gallery are read and scored again.

    Args:
        detector: the detector that judged them, with its preprocessing.
        rows: the judgements, which are read once and not kept.
        acceptance: share of ID images to accept; verdicts follow from it and the p-values.
        facts: more to say in the header.
        per_group: number of images in each group of the gallery.

    Raises:
        CalibrationError: too few calibration images for the acceptance.
        DataError: rows of another detector, or one that does not know its preprocessing.
    """
    reference, preprocessing = detector.calibration_scores_, detector.known_preprocessing()
    if reference is not None:
        check_enough(len(reference), acceptance)
    cut = threshold(reference, acceptance)
    seen = select(rows, reference, acceptance, cut, per_group)
    conf = np.array(seen.confidences)
    groups = {n: [_chosen(row, detector) for row in found] for n, found in seen.chosen.items()}
    shown = gallery(groups, detector, (preprocessing.mean, preprocessing.std))
    sections = [_counts(seen, cut)]
    if len(conf):
        sections.append(_confidences(detector, conf, cut))
        if reference is not None:
            p = Series("scored, rejected", conformal_p_values(conf, reference))
            rejected, expected = (
                f"{seen.rejected / len(conf):.1%}",
                f"{100 * (1 - acceptance):.3g}%",
            )
            said = f"{rejected} of the scored images are rejected, of ID images about {expected}."
            sections.append(acceptance_section(len(reference), None, [p], acceptance, said))
        sections += objections_section(detector.experts, {"scored": seen.objected})
        sections.append(_images(shown, cut))
        sections += _experts(detector.id_statistics_, shown)
    highlights = [("images", f"{len(conf) + seen.unreadable:,}")]
    if cut is not None:
        highlights.append(("accepted", f"{len(conf) - seen.rejected:,}"))
        highlights.append(("rejected as OOD", f"{seen.rejected:,}"))
    highlights.append(("unreadable", f"{seen.unreadable:,}"))
    asked = () if cut is None else (("acceptance", f"{acceptance:g}"),)
    about = (*facts, *detector_facts(detector), *asked)
    return Report("Judged images", about, tuple(highlights), tuple(sections))


def _counts(seen: Selection, cut: float | None) -> Section:
    readable = len(seen.confidences)
    counts = [("all", readable + seen.unreadable), ("unreadable", seen.unreadable)]
    if cut is not None:
        counts[1:1] = [("accepted", readable - seen.rejected), ("rejected as OOD", seen.rejected)]
    total = max(counts[0][1], 1)
    rows = tuple((name, f"{n:,}", f"{100 * n / total:.2f}") for name, n in counts)
    tables = [Table("Number of images", ("images", "number", "%"), rows)]
    text = () if cut is not None else ("The detector is not calibrated: there are no verdicts.",)
    if seen.faulty:
        named = tuple((row.path, row.error or "") for row in seen.faulty)
        first = f", the first {len(named)}" if seen.unreadable > len(named) else ""
        tables.append(Table(f"Unreadable files{first}", ("file", "reason"), named, prose=True))
    return Section("Verdicts", text, tuple(tables))


def _confidences(detector: FuseNorm, conf: NDArray[np.float64], cut: float | None) -> Section:
    known = Series("ID", np.zeros(0))
    if detector.calibration_scores_ is not None:
        known = Series("ID (calibration)", detector.calibration_scores_)
    elif (calibration := detector.id_statistics_) is not None:
        known = Series("ID (fit)", detector.confidence(calibration.id_scores))
    text = f"Larger = more in-distribution. {ENDS}"
    if cut is not None:
        text += f" Images below the threshold, {cut:.3g}, are rejected."
    title = "Confidence of the scored images and of ID images"
    scored = Series("scored", conf)
    figure = histogram(title, known, [scored], "confidence", cut)
    return Section("Confidences", (text,), figures=(figure,))


def _images(shown: Gallery, cut: float | None) -> Section:
    text = f"Each image as the network sees it, and {HEAT}."
    if cut is not None:
        text += " Doubtful images are closest to the threshold."
    return Section("Images", (text,), galleries=shown.cards)


def _experts(calibration: DetectorStatistics | None, shown: Gallery) -> list[Section]:
    """Every expert's scores on ID images, with the images of the gallery as marks."""
    if calibration is None or not shown.explained:
        return []
    figures = []
    for row, name in enumerate(calibration.experts):
        marks = [Series(title.lower(), why.scores[row]) for title, why in shown.explained.items()]
        known = Series("ID (fit)", calibration.id_scores[row])
        figures.append(histogram(name, known, [], "score", marks=marks))
    text = (
        "How every expert scores the ID images of the fit; the marks are images of the gallery. "
        f"Larger = more in-distribution. {ENDS}"
    )
    return [Section("Experts", (text,), figures=tuple(figures))]


def _chosen(row: Judged, detector: FuseNorm) -> Chosen:
    predicted = str(row.predicted) if detector.class_names else f"class {row.predicted}"
    facts = [("predicted", predicted), ("confidence", f"{row.confidence:.3f}")]
    if row.p_value is not None:
        facts.append(("p-value", f"{row.p_value:.3g}"))
    read = detector.known_preprocessing().read
    return Chosen("/".join(Path(row.path).parts[-2:]), tuple(facts), lambda: read(row.path))
