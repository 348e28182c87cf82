"""The report of a comparison of methods."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.evaluation.comparison import (
    BLOCKS,
    DEFAULT,
    STRONG,
    Comparison,
    Confs,
    id_conf_of,
)
from fusenorm_openood.evaluation.evaluation import mean
from fusenorm_openood.report import gallery, plots
from fusenorm_openood.report import sections as parts
from fusenorm_openood.report.evaluation import ACCEPTANCE, VERDICTS, Tested, shower, worst_of
from fusenorm_openood.report.page import SIZE, Facts, Figure, Report, Section
from fusenorm_openood.report.sections import GROUPS, Score

SHOWN = 6  # methods whose distributions are drawn
METHOD = "FuseNorm"  # with which its rows begin


def report_of_comparison(
    results: Mapping[str, Sequence[Comparison]],
    benchmark: Benchmark,
    title: str,
    facts: Facts = (),
) -> Report:
    """The report about a comparison, from the results of each run, by the name of their root.

    Images of its list are read again; `facts` are added to the header.
    """
    sections = []
    for name, runs in results.items():
        of = f", {name}" if len(results) > 1 else ""
        sections += _tables(runs, of)
    root, runs = next(iter(results.items()))
    auroc = mean([run.auroc for run in runs])
    groups = [group for group in GROUPS if group in auroc]
    scores = _scores_of_methods(runs[0], groups)
    several = len(results) > 1 or len(runs) > 1
    which = (f"Of the first training run of {root}.",) if several else ()
    text = (*which, parts.READ)
    roc = Section("ROC curves", text, figures=parts.roc_figures(scores))
    drawn = {score.name: parts.histogram(score) for score in scores[:SHOWN]}
    best = Section("Scores of ID and OOD images", text)
    sections += [roc, parts.multiples(best, drawn, {"More methods": list(drawn)})]
    sections.append(_verdicts(runs[0].conf, scores, benchmark, which))
    single = auroc[~auroc.index.str.startswith(METHOD)].drop([STRONG, BLOCKS])
    highlights = tuple(
        (f"{GROUPS[group]} AUROC, {name}", f"{dict(auroc[group])[name]:.2f}%")
        for group in groups
        for name in (DEFAULT, str(single[group].idxmax()))
    )
    return Report(title, (*facts, *scores[0].counts()), highlights, tuple(sections))


def _verdicts(
    conf: Confs, scores: Sequence[Score], benchmark: Benchmark, which: tuple[str, ...]
) -> Section:
    """A list of images, with the verdicts of FuseNorm and of the best single expert."""
    names = [score.name for score in scores]
    best = next(n for n in names if not n.startswith(METHOD) and n not in (STRONG, BLOCKS))
    shown = {name: names.index(name) for name in (DEFAULT, best)}
    cuts = [float(np.quantile(score.ids, 1 - ACCEPTANCE)) for score in scores]
    images = []
    for group, name, by_method in ((g, n, c) for g in conf for n, c in conf[g].items()):
        values = [by_method[method] for method in names]
        rejected = np.array([c < cut for c, cut in zip(values, cuts, strict=True)])
        for position, by in enumerate(rejected.T):
            facts = (
                ("data set", name),
                *((method, VERDICTS[not by[number]]) for method, number in shown.items()),
                ("rejected by", str(by.sum())),
                ("confidence", f"{values[0][position]:.3f}"),
            )
            images.append(Tested(group, name, position, float(values[0][position]), facts))
    worst, order = worst_of(images, cuts[0])
    rows = gallery.listed(map(shower(benchmark), worst), len(images), order, benchmark.norm)
    choose = frozenset((*shown, "data set"))
    about = (
        f"Each method rejects below the confidence that {ACCEPTANCE:.0%} of the ID images exceed. "
        f"The best single expert is {best}. "
        f"Of {len(scores)} methods, 'rejected by' counts those that do."
    )
    return Section("Images", (*which, about), listed=rows._replace(choose=choose))


def _tables(runs: Sequence[Comparison], of: str) -> list[Section]:
    """Near- and far-OOD metrics of every method, best first, and all figures."""
    over = f", mean over {len(runs)} training runs" if len(runs) > 1 else ""
    tables, charts = [], []
    for name, largest, each in (
        ("AUROC", True, [run.auroc for run in runs]),
        ("FPR@95", False, [run.fpr95 for run in runs]),
    ):
        table = mean(each)
        caption = f"{name} in percent{over}; the best is underlined"
        tables.append(parts.table_of(table, caption, "method", dict.fromkeys(table, largest)))
        groups = [group for group in GROUPS if group in table]
        order = table[groups].mean(axis=1).sort_values(ascending=not largest).index
        values = {GROUPS[group]: table.loc[order, group].to_dict() for group in groups}
        title, size = f"{name} of every method, best mean first", (SIZE[0], 1.0 + 0.17 * len(table))
        charts.append(Figure(title, partial(plots.dots, values, axis=f"{name}, %"), size))
    if len(runs) == 1:
        caption = (
            "Mean rank by AUROC over the data sets, and 95% bootstrap intervals of the gain in "
            "AUROC over the best single expert"
        )
        summary = runs[0].summary
        columns = [name for name in summary if str(name).split()[-1] not in ("AUROC", "FPR@95")]
        ours = summary.loc[summary.index.str.startswith(METHOD), columns]
        tables.append(parts.table_of(ours, caption, "method"))
    text = tuple(
        f"{row}: AUROC {100 * found.auroc:.2f}% on the images of its search."
        for row, found in runs[0].found.items()
    )
    glance = Section(f"At a glance{of}", figures=tuple(charts))
    return [glance, Section(f"Results{of}", text, tuple(tables))]


def _scores_of_methods(result: Comparison, groups: Sequence[str]) -> list[Score]:
    """The confidences of every method: FuseNorm's, then the others by AUROC."""
    ids = id_conf_of(result.conf)
    order = result.auroc[list(groups)].mean(axis=1).sort_values(ascending=False).index
    return [
        Score(
            name,
            ids[name],
            {g: {n: conf[name] for n, conf in result.conf[g].items()} for g in groups},
        )
        for name in (DEFAULT, *order.drop(DEFAULT))
    ]
