"""The report of an evaluation."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.detectors.base import Scored
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.evaluation.evaluation import Evaluation
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.report.charts import Series, histogram, mean_roc, roc
from fusenorm_openood.report.gallery import gallery
from fusenorm_openood.report.page import Facts, Report, Section
from fusenorm_openood.report.picks import picks
from fusenorm_openood.report.sections import (
    ENDS,
    GROUPS,
    HEAT,
    acceptance_section,
    detector_facts,
    objected,
    objections_section,
    table_of,
    threshold,
)

Values = NDArray[np.float64]


class Score(NamedTuple):
    """One score of all tested images, larger = more in-distribution.

    Attributes:
        name: `confidence`, an expert or a method.
        known: its values on ID images `[N]`.
        unknown: its values on OOD images, by group and data set.
    """

    name: str
    known: Values
    unknown: Mapping[str, Mapping[str, Values]]

    def pooled(self, group: str) -> Values:
        """Its values on all OOD images of a group."""
        return np.concatenate(list(self.unknown[group].values()))

    def figures(self, group: str) -> tuple[float, float]:
        """AUROC and FPR@95 in percent, the means over the data sets of a group."""
        each = [ood_metrics(self.known, values) for values in self.unknown[group].values()]
        return tuple(100 * np.mean([(m.auroc, m.fpr95) for m in each], axis=0))


def known_sets(result: Evaluation) -> list[Scored]:
    """What the detector gave for the ID images, covariate-shifted ones last."""
    return [s for group in ("id", "csid") for s in result.sets[group].values()]


def scores_of(result: Evaluation) -> list[Score]:
    """The confidence of an evaluation, and the scores of FuseNorm's experts."""
    known = known_sets(result)
    unknown = {group: result.sets[group] for group in GROUPS if result.sets.get(group)}
    conf = Score(
        "confidence",
        np.concatenate([s.conf for s in known]),
        {g: {n: s.conf for n, s in sets.items()} for g, sets in unknown.items()},
    )
    if not isinstance(result.detector, FuseNorm):
        return [conf]
    return [
        conf,
        *(
            Score(
                expert,
                np.concatenate([s.experts[row] for s in known]),
                {g: {n: s.experts[row] for n, s in sets.items()} for g, sets in unknown.items()},
            )
            for row, expert in enumerate(result.detector.experts)
        ),
    ]


def histograms_section(scores: list[Score], cut: float | None = None) -> Section:
    """The distribution of every score, ID against OOD; `cut` is the threshold of the first."""
    figures = []
    for number, score in enumerate(scores):
        merits = tuple(
            "{} AUROC {:.2f}, FPR@95 {:.2f}".format(GROUPS[group], *score.figures(group))
            for group in score.unknown
        )
        others = [Series(GROUPS[group], score.pooled(group)) for group in score.unknown]
        known, line = Series("ID", score.known), cut if number == 0 else None
        figures.append(histogram(score.name, known, others, "score", line, lines=merits))
    text = (
        f"Larger = more in-distribution. {ENDS} AUROC and FPR@95 in percent are means over the "
        "data sets, as in the table."
    )
    return Section("Scores of ID and OOD images", (text,), figures=tuple(figures))


def roc_section(scores: list[Score], shown: int = 4) -> Section:
    """ROC curves of the first score and of the others, the best of which are named."""
    figures = []
    for group in scores[0].unknown:
        merit = {score.name: score.figures(group)[0] for score in scores}
        first, *rest = scores
        rest.sort(key=lambda score: -merit[score.name])
        curves = {
            f"{score.name} ({merit[score.name]:.2f})": mean_roc(
                score.known, list(score.unknown[group].values())
            )
            for score in (first, *rest)
        }
        figures.append(roc(f"{GROUPS[group]} (AUROC in percent)", curves, shown))
    text = (
        "OOD is the positive class; curves are means over the data sets, so the area below one is "
        "the AUROC of the table."
    )
    return Section("ROC curves", (text,), figures=tuple(figures))


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
        result: what `evaluate` or OpenOOD found on one training run.
        benchmark: where the images come from.
        title: what was evaluated.
        facts: more to say in the header.
        table: the table to show, over several runs for example (default: that of `result`).
        validation: whether it was an evaluation on the validation pair, whose ID images the
            detector was fitted on.
        note: a remark above the table.
    """
    scores, detector = scores_of(result), result.detector
    conf = scores[0]
    # Every other ID image calibrates, the rest is tested.
    halves = [conf for s in known_sets(result) for conf in (s.conf[::2], s.conf[1::2])]
    reference = None if validation else np.sort(np.concatenate(halves[::2]))
    cut = threshold(reference, ACCEPTANCE)
    promised = cut is not None
    if cut is None:
        cut = float(np.quantile(conf.known, 1 - ACCEPTANCE))
    sections = [
        _results(result, table, note),
        histograms_section(scores, cut),
        roc_section(scores),
    ]
    if reference is not None and promised:
        sections.append(_acceptance(conf, reference, np.concatenate(halves[1::2])))
    if isinstance(detector, FuseNorm):
        counts = {}
        for group in conf.unknown:
            experts = np.concatenate([s.experts for s in result.sets[group].values()], axis=1)
            names = objected(detector, experts[:, conf.pooled(group) < cut])
            counts[GROUPS[group]] = {name: names.count(name) for name in detector.experts}
        sections += objections_section(detector.experts, counts)
    if detector is not None:
        chosen = picks(result.sets, benchmark, cut, reference, "val" if validation else "test")
        cards = gallery(chosen, detector, benchmark.norm).cards
        heat = f", and {HEAT}" if isinstance(detector, FuseNorm) else ""
        text = (
            f"Each image as the network sees it{heat}. Doubtful images are closest to the "
            f"threshold {cut:.3g}, which {ACCEPTANCE:.0%} of ID images exceed."
        )
        sections.append(Section("Images", (text,), galleries=cards))
    about = (*facts, *(() if detector is None else detector_facts(detector)))
    highlights = [
        (f"{GROUPS[group]} {name}", f"{value:.2f}%")
        for group in conf.unknown
        for name, value in zip(("AUROC", "FPR@95"), conf.figures(group), strict=True)
    ]
    return Report(title, (*about, *_numbers(conf)), tuple(highlights), tuple(sections))


def _results(result: Evaluation, table: pd.DataFrame | None, note: str) -> Section:
    shown = result.table if table is None else table
    tables = [table_of(shown, "Metrics in percent; in bold the means of the groups", "data set")]
    if len(result.compare) > 1:
        caption = "AUROC / FPR@95 in percent of the fused confidence and of every expert"
        tables.append(table_of(result.compare, caption, "expert"))
    return Section("Results", (note,) if note else (), tuple(tables))


def _acceptance(conf: Score, reference: Values, tested: Values) -> Section:
    known = Series("ID accepted", conformal_p_values(tested, reference))
    others = [
        Series(f"{GROUPS[group]} rejected", conformal_p_values(conf.pooled(group), reference))
        for group in conf.unknown
    ]
    about = (
        f"Every other ID image calibrates ({len(reference):,}), the others are tested "
        f"({len(known.values):,}), whose share scatters a little more."
    )
    return acceptance_section(len(reference), known, others, ACCEPTANCE, about)


def _numbers(conf: Score) -> Facts:
    counts = [("ID images", len(conf.known))]
    counts += [(f"{GROUPS[g]} images", len(conf.pooled(g))) for g in conf.unknown]
    return tuple((name, f"{number:,}") for name, number in counts)
