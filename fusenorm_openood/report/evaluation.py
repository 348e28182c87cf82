"""The report of an evaluation."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cache
from heapq import nlargest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.evaluation.evaluation import Evaluation, id_sets_of, with_experts
from fusenorm_openood.method.conformal import conformal_p_values, needed_images, threshold
from fusenorm_openood.report import gallery
from fusenorm_openood.report import sections as parts
from fusenorm_openood.report.gallery import REJECTED, TRUSTED, Shown
from fusenorm_openood.report.page import Facts, Report, Rows, Section
from fusenorm_openood.report.sections import GROUPS, Score, Values

ACCEPTANCE = 0.95
LISTED = 600  # images in a list, at most
VERDICTS = "rejected", "accepted"


def report_of_evaluation(
    result: Evaluation,
    benchmark: Benchmark,
    title: str,
    facts: Facts = (),
    table: pd.DataFrame | None = None,
    note: str = "",
) -> Report:
    """The report about an evaluation; a few images are read and scored again for its gallery.

    `facts` are added to the header; `table` is shown instead of that of `result`, below a `note`.
    """
    scores, detector = _scores(result), result.detector
    conf = scores[0]
    # Every other ID image calibrates, the rest is tested; but the detector was fitted on those of
    # the validation pair.
    id_conf, fitted = [s.conf for s in id_sets_of(result.sets)], "valood" in conf.ood
    calibration = None if fitted else np.sort(np.concatenate([c[::2] for c in id_conf]))
    is_enough = calibration is not None and len(calibration) >= needed_images(ACCEPTANCE)
    if calibration is not None and is_enough:
        cut = threshold(calibration, ACCEPTANCE)
    else:
        cut = float(np.quantile(conf.ids, 1 - ACCEPTANCE))
    caption = "Metrics in percent; in bold the means of the groups"
    tables = [parts.table_of(result.table if table is None else table, caption, "data set")]
    compared = []
    if len(result.compare) > 1:
        caption = "AUROC / FPR@95 in percent of the fused confidence and of every expert"
        compared.append(parts.table_of(result.compare, caption, "expert"))
    figures = (parts.histogram(conf, cut), *parts.roc_figures(scores))
    text = (note, parts.READ) if note else (parts.READ,)
    sections = [Section("Results", text, tuple(tables), figures)]
    if calibration is not None and is_enough:
        tested = np.concatenate([c[1::2] for c in id_conf])
        sections.append(_acceptance(conf, calibration, tested))
    if detector is not None:
        facts = (*facts, *parts.detector_facts(detector))
        detector = copy(detector)
        detector.calibration_ = None  # p-values are those above, and groups are not known
        result = result._replace(detector=detector)
        images, rows = _images(result, benchmark, cut, calibration)
        galleries, _ = gallery.gallery(images, detector, benchmark.norm)
        heat = f", and {parts.HEAT}" if isinstance(detector, FuseNorm) else ""
        about = (
            f"Each image as the network sees it{heat}. Doubtful images are closest to the "
            f"threshold {cut:.3g}, which {ACCEPTANCE:.0%} of ID images exceed."
        )
        sections.append(Section("Images", (about,), galleries=galleries, listed=rows))
    if isinstance(detector, FuseNorm):
        counts = {}
        for group in conf.ood:
            experts = np.concatenate([s.experts for s in result.sets[group].values()], axis=1)
            rejected = experts[:, conf.pooled(group) < cut]
            pred = np.zeros(rejected.shape[1], np.int64)
            counts[GROUPS[group]] = Counter(detector.explain_scores(rejected, pred).objected)
        drawn = {score.name: parts.histogram(score) for score in scores[1:]}
        why = parts.why_section(detector, counts, drawn, parts.READ)
        sections.append(why._replace(tables=tuple(compared)))
    highlights = tuple(
        (f"{GROUPS[group]} {name}", f"{value:.2f}%")
        for group in conf.ood
        for name, value in zip(("AUROC", "FPR@95"), conf.figures(group), strict=True)
    )
    return Report(title, (*facts, *conf.counts()), highlights, tuple(sections))


def _scores(result: Evaluation) -> list[Score]:
    """The confidence of an evaluation, and the scores of FuseNorm's experts."""
    experts = result.detector.experts if isinstance(result.detector, FuseNorm) else ()
    ids = np.concatenate([with_experts(s) for s in id_sets_of(result.sets)], axis=1)
    ood = {
        group: {name: with_experts(s) for name, s in result.sets[group].items()}
        for group in GROUPS
        if result.sets.get(group)
    }
    return [
        Score(name, ids[row], {g: {n: s[row] for n, s in sets.items()} for g, sets in ood.items()})
        for row, name in enumerate(("confidence", *experts))
    ]


def _acceptance(conf: Score, calibration: Values, tested: Values) -> Section:
    ids = {"ID images": conformal_p_values(tested, calibration)}
    others = {GROUPS[g]: conformal_p_values(conf.pooled(g), calibration) for g in conf.ood}
    about = (
        f"Every other ID image calibrates ({len(calibration):,}), the others are tested "
        f"({len(tested):,}), whose share scatters a little more."
    )
    text = (about, *parts.promised(len(calibration), ACCEPTANCE))
    figures = parts.acceptance_figures(len(calibration), ids, others, ACCEPTANCE)
    return Section("Acceptance and rejection", text, figures=figures)


class Tested(NamedTuple):
    """A tested image."""

    group: str
    name: str
    position: int
    confidence: float
    facts: Facts = ()


def shower(benchmark: Benchmark, validation: bool = False) -> Callable[[Tested], Shown]:
    """What is shown of a tested image: what it is, and its facts."""
    image_sets = benchmark.groups(True, validation)

    @cache
    def images_of(group: str, name: str) -> ImageList:
        return image_sets[group][name].images()

    def shown(image: Tested) -> Shown:
        images = images_of(image.group, image.name)
        name, label, _ = images.entries[image.position]
        kind = {"id": "ID", "csid": "covariate-shifted ID", **GROUPS}[image.group]
        truth = image.name if image.group in GROUPS else f"class {label}"
        link = (images.data_dir / name).absolute().as_uri()
        facts = (("truth", f"{kind}, {truth}"), *image.facts)
        return Shown(name, facts, lambda: images[image.position]["data"], link)

    return shown


def worst_of(images: Iterable[Tested], cut: float) -> tuple[list[Tested], str]:
    """Images of each set, the worst mistakes at a threshold first, and this order in words."""

    def wrong(image: Tested) -> float:
        return image.confidence - cut if image.group in GROUPS else cut - image.confidence

    by_set: dict[tuple[str, str], list[Tested]] = {}
    for image in images:
        by_set.setdefault((image.group, image.name), []).append(image)
    most = LISTED // len(by_set)
    worst = [image for of in by_set.values() for image in nlargest(most, of, wrong)]
    order = f"at most {most} of each set, those farthest beyond the threshold first"
    return sorted(worst, key=wrong, reverse=True), order


def _images(
    result: Evaluation, benchmark: Benchmark, cut: float, calibration: Values | None
) -> tuple[dict[str, list[Shown]], Rows]:
    """The images to show, by group: extreme and doubtful ones, and the worst mistakes; a list."""
    shown = shower(benchmark, calibration is None)

    def tested(group: str) -> Iterator[Tested]:
        calibrating = calibration is not None and group not in GROUPS
        for name, s in result.sets.get(group, {}).items():
            for position, (conf, pred) in enumerate(
                zip(s.conf.tolist(), s.pred.tolist(), strict=True)
            ):
                if position % 2 or not calibrating:
                    facts = [("predicted", f"class {pred}"), ("confidence", f"{conf:.3f}")]
                    if calibration is not None:
                        facts.append(
                            ("p-value", f"{float(conformal_p_values(conf, calibration)):.3g}")
                        )
                    yield Tested(group, name, position, conf, tuple(facts))

    def row(image: Tested, *more: str) -> Shown:
        known = shown(image)
        facts = [("verdict", VERDICTS[image.confidence >= cut]), ("data set", image.name)]
        facts += [*known.facts, *(("lowest contribution", objected) for objected in more)]
        return known._replace(facts=tuple(facts))

    ids = [image for group in ("id", "csid") for image in tested(group)]
    ood = [image for group in GROUPS for image in tested(group)]
    chosen = gallery.choose([*ids, *ood], lambda image: cut)
    rejected = sorted((i for i in (*ids, *ood) if i.confidence < cut), key=lambda i: i.confidence)
    chosen[REJECTED] = gallery.varied(rejected, lambda image: (image.name, image.facts[0]))
    chosen["OOD images that are trusted most"] = gallery.choose(ood, None)[TRUSTED]
    chosen["ID images that are rejected most"] = gallery.choose(ids, None)[REJECTED]
    worst, order = worst_of([*ids, *ood], cut)
    columns: list[Sequence[Any]] = [worst]
    if isinstance(result.detector, FuseNorm):
        scores = [result.sets[i.group][i.name].experts[:, i.position] for i in worst]
        why = result.detector.explain_scores(np.stack(scores, 1), np.zeros(len(worst), np.int64))
        columns.append(why.objected)
    rows = gallery.listed(map(row, *columns), len(ids) + len(ood), order, benchmark.norm)
    return {title: [shown(image) for image in images] for title, images in chosen.items()}, rows
