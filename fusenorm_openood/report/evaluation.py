"""The report of an evaluation."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.detectors.base import Scored
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.evaluation.evaluation import Evaluation
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.report import sections as parts
from fusenorm_openood.report.charts import Series
from fusenorm_openood.report.gallery import REJECTED, TRUSTED, Shown, choose, gallery
from fusenorm_openood.report.page import Facts, Report, Section
from fusenorm_openood.report.sections import GROUPS, Score, Values

ACCEPTANCE = 0.95


def report_of_evaluation(
    result: Evaluation,
    benchmark: Benchmark,
    title: str,
    facts: Facts = (),
    table: pd.DataFrame | None = None,
    validation: bool = False,
    note: str = "",
) -> Report:
    """The report about an evaluation; a few images are read and scored again for its gallery.

    Args:
        result: results of `evaluate` or of OpenOOD on one training run.
        benchmark: where the images come from.
        title: what was evaluated.
        facts: more facts for the header.
        table: the table to show, over several runs for example (default: that of `result`).
        validation: whether it was an evaluation on the validation pair, whose ID images the
            detector was fitted on.
        note: a remark above the table.
    """
    scores, detector = _scores(result), result.detector
    conf = scores[0]
    # Every other ID image calibrates, the rest is tested.
    known = [s.conf for group in ("id", "csid") for s in result.sets[group].values()]
    reference = None if validation else np.sort(np.concatenate([c[::2] for c in known]))
    promised = cut = parts.threshold(reference, ACCEPTANCE)
    if cut is None:
        cut = float(np.quantile(conf.known, 1 - ACCEPTANCE))
    tables = [
        parts.table_of(
            result.table if table is None else table,
            "Metrics in percent; in bold the means of the groups",
            "data set",
        )
    ]
    if len(result.compare) > 1:
        caption = "AUROC / FPR@95 in percent of the fused confidence and of every expert"
        tables.append(parts.table_of(result.compare, caption, "expert"))
    sections = [
        Section("Results", (note,) if note else (), tuple(tables)),
        parts.histograms_section(scores, cut),
        parts.roc_section(scores),
    ]
    if reference is not None and promised is not None:
        tested = np.concatenate([c[1::2] for c in known])
        sections.append(_acceptance(conf, reference, tested))
    if isinstance(detector, FuseNorm):
        counts = {}
        for group in conf.unknown:
            experts = np.concatenate([s.experts for s in result.sets[group].values()], axis=1)
            names = parts.lowest_contributions(detector, experts[:, conf.pooled(group) < cut])
            counts[GROUPS[group]] = {name: names.count(name) for name in detector.experts}
        sections += parts.contributions_section(detector.experts, counts)
    if detector is not None:
        images = _images(result, benchmark, cut, reference, "val" if validation else "test")
        galleries, _ = gallery(images, detector, benchmark.norm)
        heat = f", and {parts.HEAT}" if isinstance(detector, FuseNorm) else ""
        text = (
            f"Each image as the network sees it{heat}. Doubtful images are closest to the "
            f"threshold {cut:.3g}, which {ACCEPTANCE:.0%} of ID images exceed."
        )
        sections.append(Section("Images", (text,), galleries=galleries))
        facts = (*facts, *parts.detector_facts(detector))
    highlights = tuple(
        (f"{GROUPS[group]} {name}", f"{value:.2f}%")
        for group in conf.unknown
        for name, value in zip(("AUROC", "FPR@95"), conf.figures(group), strict=True)
    )
    return Report(title, (*facts, *conf.counts()), highlights, tuple(sections))


def _scores(result: Evaluation) -> list[Score]:
    """The confidence of an evaluation, and the scores of FuseNorm's experts."""
    known = [s for group in ("id", "csid") for s in result.sets[group].values()]
    unknown = {group: result.sets[group] for group in GROUPS if result.sets.get(group)}

    def score(name: str, values: Callable[[Scored], Values]) -> Score:
        return Score(
            name,
            np.concatenate([values(s) for s in known]),
            {group: {n: values(s) for n, s in sets.items()} for group, sets in unknown.items()},
        )

    experts = result.detector.experts if isinstance(result.detector, FuseNorm) else ()
    return [
        score("confidence", lambda s: s.conf),
        *(score(name, lambda s, row=row: s.experts[row]) for row, name in enumerate(experts)),  # type: ignore[misc]
    ]


def _acceptance(conf: Score, reference: Values, tested: Values) -> Section:
    known = Series("ID accepted", conformal_p_values(tested, reference))
    others = [
        Series(f"{GROUPS[group]} rejected", conformal_p_values(conf.pooled(group), reference))
        for group in conf.unknown
    ]
    about = (
        f"Every other ID image calibrates ({len(reference):,}), the others are tested "
        f"({len(tested):,}), whose share scatters a little more."
    )
    return parts.acceptance_section(len(reference), known, others, ACCEPTANCE, about)


class _Tested(NamedTuple):
    """A tested image."""

    group: str
    name: str
    position: int
    confidence: float
    predicted: int
    label: int


def _images(
    result: Evaluation, benchmark: Benchmark, cut: float, reference: Values | None, split: str
) -> dict[str, list[Shown]]:
    """The images to show, by group: extreme and doubtful ones, and the worst mistakes."""
    image_sets = {
        "id": {benchmark.name: benchmark.id[split]},
        "csid": benchmark.csid,
        "valood": {"val": benchmark.val_ood},
        "nearood": benchmark.near,
        "farood": benchmark.far,
    }

    def tested(group: str) -> Iterator[_Tested]:
        calibrating = reference is not None and group not in GROUPS
        for name, s in result.sets.get(group, {}).items():
            rows = zip(s.conf.tolist(), s.pred.tolist(), s.label.tolist(), strict=True)
            for position, row in enumerate(rows):
                if position % 2 or not calibrating:
                    yield _Tested(group, name, position, *row)

    def shown(image: _Tested) -> Shown:
        images = image_sets[image.group][image.name].images()
        if image.group in GROUPS:
            truth = f"{GROUPS[image.group]}, {image.name}"
        else:
            kind = "ID" if image.group == "id" else "covariate-shifted ID"
            truth = f"{kind}, class {image.label}"
        facts = [("truth", truth), ("predicted", f"class {image.predicted}")]
        facts.append(("confidence", f"{image.confidence:.3f}"))
        if reference is not None:
            p_value = float(conformal_p_values(image.confidence, reference))
            facts.append(("p-value", f"{p_value:.3g}"))

        def read() -> Tensor:
            tensor: Tensor = images[image.position]["data"]
            return tensor

        return Shown(images.entries[image.position].name, tuple(facts), read)

    known = [image for group in ("id", "csid") for image in tested(group)]
    ood = [image for group in GROUPS for image in tested(group)]
    chosen = choose([*known, *ood], cut)
    chosen["OOD images that are trusted most"] = choose(ood, cut)[TRUSTED]
    chosen["ID images that are rejected most"] = choose(known, cut)[REJECTED]
    return {title: [shown(image) for image in images] for title, images in chosen.items()}
