"""The report of judged image files."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import Explanation
from fusenorm_openood.errors import DataError
from fusenorm_openood.method.calibration import Calibration
from fusenorm_openood.report import charts, gallery
from fusenorm_openood.report import sections as parts
from fusenorm_openood.report.charts import Series
from fusenorm_openood.report.gallery import DOUBTFUL, REJECTED, TRUSTED
from fusenorm_openood.report.page import Facts, Report, Section, Table
from fusenorm_openood.report.sections import Values

CHUNK = 10_000  # rows in memory at a time
FAULTY = 10  # unreadable files that are listed


def report_of_files(
    detector: FuseNorm,
    rows: Iterable[Judged],
    acceptance: float = 0.95,
    facts: Facts = (),
    per_group: int = gallery.PER_GROUP,
) -> Report:
    """The report about judged files; only the images of its gallery are read and scored again.

    Args:
        detector: the detector that judged them, with its preprocessing.
        rows: read once and not stored.
        acceptance: share of ID images to accept; verdicts follow from it and the p-values.
        facts: more facts for the header.
        per_group: number of images in each group of the gallery.

    Raises:
        CalibrationError: too few calibration images for the acceptance.
        DataError: rows of another detector, or a detector without its preprocessing.
    """
    calibration, preprocessing = detector.calibration_, detector.known_preprocessing()
    cuts = None if calibration is None else calibration.thresholds(acceptance)
    group_of = _group_of(detector)
    cut = None if cuts is None else lambda row: float(cuts[group_of(row)])
    summary = _summarise(rows, calibration, group_of, cut, per_group)
    conf, group = np.array(summary.confidences), np.array(summary.groups, np.int64)
    is_rejected = np.zeros(len(conf), bool) if cuts is None else conf < cuts[group]
    rejected = int(is_rejected.sum())
    shown = {n: [_shown(row, detector) for row in chosen] for n, chosen in summary.chosen.items()}
    norm, visible = (preprocessing.mean, preprocessing.std), preprocessing.shown
    galleries, explained = gallery.gallery(shown, detector, norm, visible)

    counts = [("all", len(conf) + summary.unreadable), ("unreadable", summary.unreadable)]
    if cuts is not None:
        counts[1:1] = [("accepted", len(conf) - rejected), ("rejected as OOD", rejected)]
    sections = [_counts(counts, summary.faulty)]
    if len(conf):
        sections.append(_confidences(detector, conf, cuts))
        if calibration is not None and calibration.by:
            names = detector.class_names or calibration.names
            sections.append(
                parts.groups_section(calibration, names, group, ~is_rejected, acceptance)
            )
        elif calibration is not None:
            p = Series("scored, rejected", calibration.p_values(conf, group))
            about = (
                f"{rejected / len(conf):.1%} of the scored images are rejected, of ID images about "
                f"{100 * (1 - acceptance):.3g}%."
            )
            sections.append(
                parts.acceptance_section(len(calibration), None, [p], acceptance, about)
            )
        sections += parts.contributions_section(detector.experts, {"scored": summary.objected})
        text = f"Each image as the network sees it, and {parts.HEAT}."
        if visible is not None:
            text += f" Pictures show channel(s) {', '.join(map(str, visible))}, counted from 0."
        elif preprocessing.channels not in (1, 3):
            text += f" Pictures show the mean of {preprocessing.channels} channels."
        if cuts is not None:
            text += " Doubtful images are closest to the threshold."
        sections.append(Section("Images", (text,), galleries=galleries))
        sections += _experts(detector, explained)
    highlights = tuple((name.replace("all", "images"), f"{number:,}") for name, number in counts)
    asked = () if cuts is None else (("acceptance", f"{acceptance:g}"),)
    about_all = (*facts, *parts.detector_facts(detector), *asked)
    return Report("Judged images", about_all, highlights, tuple(sections))


def _group_of(detector: FuseNorm) -> Callable[[Judged], int]:
    """From a row to the number of its group; DataError if it has none."""
    calibration = detector.calibration_
    if calibration is None or calibration.by is None:
        return lambda row: 0
    names = detector.class_names or calibration.names
    numbers: dict[str | None, list[int]] = {}
    for group, name in enumerate(names):  # some data sets have two classes of one name
        numbers.setdefault(name, []).append(group)

    def number(row: Judged) -> int:
        if row.predicted not in numbers:
            raise DataError(
                f"{row.path} was judged by another detector: this one has no class "
                f"{row.predicted!r}: give the detector that judged it, or score again"
            )
        groups = np.array(numbers[row.predicted])
        p = calibration.p_values(np.full(len(groups), row.confidence), groups)
        return int(groups[abs(p - (row.p_value or 0.0)).argmin()])

    return number


@dataclass
class _Summary:
    """What the report needs of the rows."""

    confidences: "array[float]" = field(default_factory=lambda: array("d"))  # of readable files
    groups: "array[int]" = field(default_factory=lambda: array("q"))  # of these
    objected: Counter[str] = field(default_factory=Counter)  # of rejected files
    unreadable: int = 0
    faulty: list[Judged] = field(default_factory=list)  # the first unreadable files
    chosen: dict[str, list[Judged]] = field(default_factory=dict)  # to show, by group


def _summarise(
    rows: Iterable[Judged],
    calibration: Calibration | None,
    group_of: Callable[[Judged], int],
    cut: Callable[[Any], float] | None,
    per_group: int,
) -> _Summary:
    """Read rows once; DataError if the p-values are not those of this detector."""
    summary, rows = _Summary(), iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        faulty = [row for row in chunk if row.error is not None]
        summary.unreadable += len(faulty)
        summary.faulty += faulty[: FAULTY - len(summary.faulty)]
        judged = [row for row in chunk if row.error is None]
        for row in judged:
            if row.confidence is None:
                raise DataError(
                    f"{row.path} has no confidence, as it was rejected early: score it again "
                    "without --early"
                )
        conf = np.array([row.confidence for row in judged], np.float64)
        group = np.array([group_of(row) for row in judged], np.int64)
        summary.confidences.extend(conf)
        summary.groups.extend(group)
        if calibration is not None:
            for row, p in zip(judged, calibration.p_values(conf, group), strict=True):
                if row.p_value is not None and abs(row.p_value - p) > 1e-6:
                    raise DataError(
                        f"{row.path} was judged by another detector: its p-value is "
                        f"{row.p_value:g}, with this one it is {p:g}: give the detector that "
                        "judged it, or score again"
                    )
        if cut is not None:
            rejected = (row for row, c in zip(judged, conf, strict=True) if c < cut(row))
            summary.objected.update(row.objected for row in rejected if row.objected)
        # Some may be in another group already.
        summary.chosen = gallery.choose(judged, cut, 3 * per_group, summary.chosen)
    chosen, taken = summary.chosen, set[str]()
    for name in (REJECTED, TRUSTED, DOUBTFUL):
        free = [row for row in chosen.get(name, ()) if row.path not in taken]
        if cut is not None and name != DOUBTFUL:
            low = {row.path for row in free if (row.confidence or 0.0) < cut(row)}
            free = [row for row in free if (row.path in low) == (name == REJECTED)]
        chosen[name] = free[:per_group]
        taken.update(row.path for row in chosen[name])
    order = (REJECTED, DOUBTFUL, TRUSTED)
    summary.chosen = {name: chosen[name] for name in order if chosen[name]}
    return summary


def _shown(row: Judged, detector: FuseNorm) -> gallery.Shown:
    predicted = str(row.predicted) if detector.class_names else f"class {row.predicted}"
    facts = [("predicted", predicted), ("confidence", f"{row.confidence:.3f}")]
    if row.p_value is not None:
        facts.append(("p-value", f"{row.p_value:.3g}"))
    read = detector.known_preprocessing().read
    return gallery.Shown("/".join(Path(row.path).parts[-2:]), tuple(facts), lambda: read(row.path))


def _counts(counts: list[tuple[str, int]], faulty: list[Judged]) -> Section:
    total = max(counts[0][1], 1)
    rows = tuple((name, f"{n:,}", f"{100 * n / total:.2f}") for name, n in counts)
    tables = [Table("Number of images", ("images", "number", "%"), rows)]
    is_calibrated = len(counts) > 2
    text = () if is_calibrated else ("The detector is not calibrated: there are no verdicts.",)
    if faulty:
        named = tuple((row.path, row.error or "") for row in faulty)
        first = f", the first {len(named)}" if counts[-1][1] > len(named) else ""
        tables.append(Table(f"Unreadable files{first}", ("file", "reason"), named, prose=True))
    return Section("Verdicts", text, tuple(tables))


def _confidences(detector: FuseNorm, conf: Values, cuts: Values | None) -> Section:
    ids = Series("ID", np.zeros(0))
    if detector.calibration_scores_ is not None:
        ids = Series("ID (calibration)", detector.calibration_scores_)
    elif (statistics := detector.id_statistics_) is not None:
        ids = Series("ID (fit)", detector.confidence(statistics.id_scores))
    text = f"Larger = more in-distribution. {parts.ENDS}"
    cut = float(cuts[0]) if cuts is not None and len(cuts) == 1 else None
    if cut is not None:
        text += f" Images below the threshold, {cut:.3g}, are rejected."
    elif cuts is not None:
        text += (
            f" Images below the threshold of their predicted class, from {cuts.min():.3g} to "
            f"{cuts.max():.3g}, are rejected."
        )
    title = "Confidence of the scored images and of ID images"
    figure = charts.histogram(title, ids, [Series("scored", conf)], "confidence", cut)
    return Section("Confidences", (text,), figures=(figure,))


def _experts(detector: FuseNorm, explained: Mapping[str, Explanation]) -> list[Section]:
    """Every expert's scores on ID images, with the images of the gallery as marks."""
    statistics = detector.id_statistics_
    if statistics is None or not explained:
        return []
    figures = []
    for row, name in enumerate(statistics.experts):
        marks = [Series(title.lower(), why.scores[row]) for title, why in explained.items()]
        ids = Series("ID (fit)", statistics.id_scores[row])
        figures.append(charts.histogram(name, ids, [], "score", marks=marks))
    text = (
        "How every expert scores the ID images of the fit; the marks are images of the gallery. "
        f"Larger = more in-distribution. {parts.ENDS}"
    )
    return [Section("Experts", (text,), figures=tuple(figures))]
