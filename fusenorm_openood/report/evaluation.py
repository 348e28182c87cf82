"""The report about an evaluation on a benchmark."""

import numpy as np
import pandas as pd

from fusenorm_openood.benchmark.evaluation import Evaluation
from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.report.content import Facts, Report, Section
from fusenorm_openood.report.figures import Series
from fusenorm_openood.report.gallery import gallery
from fusenorm_openood.report.picks import picks
from fusenorm_openood.report.scores import (
    Score,
    Values,
    histograms_section,
    known_sets,
    roc_section,
    scores_of,
)
from fusenorm_openood.report.sections import (
    GROUPS,
    HEAT,
    acceptance_section,
    detector_facts,
    objected,
    objections_section,
    table_of,
    threshold,
)

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
