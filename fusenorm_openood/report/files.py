"""The report of judged image files."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import Explanation
from fusenorm_openood.errors import DataError
from fusenorm_openood.method.calibration import Calibration
from fusenorm_openood.report import gallery, plots
from fusenorm_openood.report import sections as parts
from fusenorm_openood.report.gallery import DOUBTFUL, REJECTED, TRUSTED
from fusenorm_openood.report.page import Facts, Figure, Report, Rows, Section, Table
from fusenorm_openood.report.sections import Values
from fusenorm_openood.storage.urls import Url, place, split_page

CHUNK = 10_000  # rows in memory at a time
FAULTY = 10  # unreadable files that are listed
LISTED = 3_000  # images in a list, at most


def report_of_files(
    detector: FuseNorm,
    rows: Iterable[Judged],
    acceptance: float = 0.95,
    facts: Facts = (),
    per_group: int = gallery.PER_GROUP,
) -> Report:
    """The report about judged files; as many images as it can hold are read again.

    Args:
        detector: the detector that judged them, with its preprocessing.
        rows: read once and not stored.
        acceptance: share of ID images to accept; verdicts follow from it and the p-values.
        facts: more facts for the header.
        per_group: number of images in each group of the gallery.

    Raises:
        CalibrationError: too few calibration images for the acceptance.
        DataError: rows of another detector, or a detector without its preprocessing.
        NotFittedError: before `fit`.
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

    counts = [("images", len(conf) + summary.unreadable), ("unreadable", summary.unreadable)]
    if cuts is not None:
        counts[1:1] = [("accepted", len(conf) - rejected), ("rejected as OOD", rejected)]
    sections = [_unreadable(summary)]
    if len(conf):
        said, figure = _confidences(detector, conf, cuts)
        text, figures = [said], [figure]
        about = f"Each image as the network sees it, and {parts.HEAT}."
        if cuts is None:
            text.append("The detector is not calibrated: there are no verdicts.")
        else:
            text[:0] = [
                f"{rejected / len(conf):.1%} of the scored images are rejected, of ID images about "
                f"{100 * (1 - acceptance):.3g}%."
            ]
            about += (
                " Doubtful images are closest to the threshold; of the rejected ones, those with "
                "the lowest confidence that differ in class and in the expert that objects."
            )
        if visible is not None:
            about += f" Pictures show channel(s) {', '.join(map(str, visible))}, counted from 0."
        elif preprocessing.channels not in (1, 3):
            about += f" Pictures show the mean of {preprocessing.channels} channels."
        listed = _listed(summary.lowest, detector, cut, len(conf))
        sections.append(Section("Images", (about,), galleries=galleries, listed=listed))
        sections.append(_why(detector, summary.objected, explained))
        if calibration is not None and calibration.by:
            names = detector.class_names or calibration.names
            shares = parts.groups_section(calibration, names, group, ~is_rejected, acceptance)
            sections.append(shares)
        elif calibration is not None:
            p, images = {"scored": calibration.p_values(conf, group)}, len(calibration)
            figures += parts.acceptance_figures(images, {}, p, acceptance)
            text += parts.promised(images, acceptance)
        sections[0] = sections[0]._replace(text=tuple(text), figures=tuple(figures))
    highlights = tuple((name, f"{number:,}") for name, number in counts)
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
        if len(numbers[row.predicted]) == 1:
            return numbers[row.predicted][0]
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
    lowest: list[Judged] = field(default_factory=list)  # relative to the threshold


def _summarise(
    rows: Iterable[Judged],
    calibration: Calibration | None,
    group_of: Callable[[Judged], int],
    cut: Callable[[Any], float] | None,
    per_group: int,
) -> _Summary:
    """Read rows once; DataError if the p-values are not those of this detector."""
    summary, rows = _Summary(), iter(rows)

    def margin(row: Judged) -> float:
        return (row.confidence or 0.0) - (cut(row) if cut else 0.0)

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
        summary.lowest = nsmallest(LISTED, [*summary.lowest, *judged], key=margin)
        # Some may be in another group already.
        summary.chosen = gallery.choose(judged, cut, 3 * per_group, summary.chosen)
    chosen, taken = summary.chosen, set[str]()
    low = [r for r in summary.lowest if margin(r) < 0] if cut else chosen.get(REJECTED, [])
    chosen[REJECTED] = gallery.varied(
        low, lambda row: (row.objected, row.predicted, row.path), per_group
    )
    for name in (REJECTED, TRUSTED, DOUBTFUL):
        free = [row for row in chosen.get(name, ()) if row.path not in taken]
        if cut is not None and name != DOUBTFUL:
            free = [row for row in free if (margin(row) < 0) == (name == REJECTED)]
        chosen[name] = free[:per_group]
        taken.update(row.path for row in chosen[name])
    order = (REJECTED, DOUBTFUL, TRUSTED)
    summary.chosen = {name: chosen[name] for name in order if chosen[name]}
    return summary


def _shown(row: Judged, detector: FuseNorm) -> gallery.Shown:
    predicted = str(row.predicted) if detector.class_names else f"class {row.predicted}"
    facts = [("predicted", predicted), ("confidence", f"{row.confidence:.3f}")]
    if detector.calibration_ is not None:
        facts.append(("p-value", "" if row.p_value is None else f"{row.p_value:.3g}"))
    read = detector.known_preprocessing().read
    name = "/".join(Path(row.path).parts[-2:])
    return gallery.Shown(name, tuple(facts), lambda: read(row.path), link_to(row.path))


def link_to(path: str) -> str:
    """The URL of an image file, empty if no browser could open it."""
    file, page = split_page(place(path))
    if isinstance(file, Url):
        return path if path.lower().startswith(("http://", "https://")) else ""
    return file.absolute().as_uri() + (f"#page={page}" if page else "")


def _unreadable(summary: _Summary) -> Section:
    if not summary.faulty:
        return Section("Verdicts")
    named = tuple((row.path, row.error or "") for row in summary.faulty)
    first = f", the first {len(named)}" if summary.unreadable > len(named) else ""
    table = Table(f"Unreadable files{first}", ("file", "reason"), named, prose=True)
    return Section("Verdicts", tables=(table,))


def _listed(
    lowest: list[Judged], detector: FuseNorm, cut: Callable[[Any], float] | None, number: int
) -> Rows:
    """The rows of the lowest confidences."""

    def shown(row: Judged) -> gallery.Shown:
        image = _shown(row, detector)
        facts = (*image.facts, ("lowest contribution", row.objected or ""))
        if cut is not None:
            verdict = "rejected" if (row.confidence or 0.0) < cut(row) else "accepted"
            facts = (("verdict", verdict), *facts)
        return image._replace(name=image.name if image.link else row.path, facts=facts)

    how = detector.known_preprocessing()
    order = "lowest confidence first" if cut is None else "those farthest below the threshold first"
    return gallery.listed(map(shown, lowest), number, order, (how.mean, how.std), how.shown)


def _confidences(detector: FuseNorm, conf: Values, cuts: Values | None) -> tuple[str, Figure]:
    if detector.calibration_scores_ is not None:
        name, ids = "ID (calibration)", detector.calibration_scores_
    else:
        name, ids = "ID (fit)", detector.confidence(detector.check_fitted().id_scores)
    text = f"Confidences: larger = more in-distribution. {parts.ENDS}"
    cut = float(cuts[0]) if cuts is not None and len(cuts) == 1 else None
    title = "Confidence of the scored images and of ID images"
    if cut is not None:
        title = f"Rejected: images below the threshold, {cut:.4g}"
    elif cuts is not None:
        text += (
            f" Images below the threshold of their predicted class, from {cuts.min():.3g} to "
            f"{cuts.max():.3g}, are rejected."
        )
    draw = partial(plots.histograms, {name: ids, "scored": conf}, threshold=cut)
    return text, Figure(title, draw)


def _why(
    detector: FuseNorm, objected: Counter[str], explained: Mapping[str, Explanation]
) -> Section:
    """Every expert's scores on ID images, with the images of the gallery as marks."""
    statistics, figures = detector.check_fitted(), {}
    for row, name in enumerate(statistics.experts):
        marks = {title.lower(): why.scores[row] for title, why in explained.items()}
        ids = {"ID (fit)": statistics.id_scores[row]}
        figures[name] = Figure(name, partial(plots.histograms, ids, marks=marks))
    text = (
        "How the experts score the ID images of the fit; the marks are images of the gallery. "
        f"Larger = more in-distribution. {parts.ENDS}"
    )
    return parts.why_section(detector, {"scored": objected}, figures, text)
