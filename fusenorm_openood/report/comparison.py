"""The report about a comparison of methods."""

from collections.abc import Mapping, Sequence

import pandas as pd

from fusenorm_openood.evaluation.comparison import DEFAULT, Comparison
from fusenorm_openood.evaluation.comparison import GROUPS as MEANS
from fusenorm_openood.report.charts import dots
from fusenorm_openood.report.page import Facts, Figure, Report, Section
from fusenorm_openood.report.sections import (
    GROUPS,
    Score,
    histograms_section,
    roc_section,
    table_of,
)

SHOWN = 6  # methods whose distributions are drawn
METHOD = "FuseNorm"  # with which its rows begin


def report_of_comparison(
    results: Mapping[str, Sequence[Comparison]], title: str, facts: Facts = ()
) -> Report:
    """The report about a comparison.

    Args:
        results: results of each training run, by the name of their root.
        title: what was compared.
        facts: more facts for the header.
    """
    sections = []
    for name, runs in results.items():
        of = f", {name}" if len(results) > 1 else ""
        sections += [_at_a_glance(runs, of), _tables(runs, of)]
    root, runs = next(iter(results.items()))
    auroc = _mean([run.auroc for run in runs])
    groups = [group for group in MEANS if group in auroc]
    scores = _scores(runs[0], groups)
    several = len(results) > 1 or len(runs) > 1
    which = (f"Of the first training run of {root}.",) if several else ()
    for section in (roc_section(scores), histograms_section(scores[:SHOWN])):
        sections.append(section._replace(text=(*which, *section.text)))
    others = auroc[~auroc.index.str.startswith(METHOD)]
    highlights = tuple(
        (f"{GROUPS[group]} AUROC, {name}", f"{dict(auroc[group])[name]:.2f}%")
        for group in groups
        for name in (DEFAULT, str(others[group].idxmax()))
    )
    return Report(title, (*facts, *scores[0].counts()), highlights, tuple(sections))


def _at_a_glance(runs: Sequence[Comparison], of: str) -> Section:
    """Near- and far-OOD metrics of every method, best first."""

    def chart(title: str, table: pd.DataFrame, ascending: bool) -> Figure:
        groups = [group for group in MEANS if group in table]
        order = table[groups].mean(axis=1).sort_values(ascending=ascending).index
        values = {GROUPS[group]: table.loc[order, group].to_dict() for group in groups}
        return dots(f"{title} of every method, best mean first", values, f"{title}, %")

    auroc = chart("AUROC", _mean([run.auroc for run in runs]), False)
    fpr95 = chart("FPR@95", _mean([run.fpr95 for run in runs]), True)
    return Section(f"At a glance{of}", figures=(auroc, fpr95))


def _tables(runs: Sequence[Comparison], of: str) -> Section:
    auroc, fpr95 = _mean([run.auroc for run in runs]), _mean([run.fpr95 for run in runs])
    over = f", mean over {len(runs)} training runs" if len(runs) > 1 else ""
    best = f"in percent{over}; the best is underlined"
    tables = [
        table_of(auroc, f"AUROC {best}", "method", dict.fromkeys(auroc, True)),
        table_of(fpr95, f"FPR@95 {best}", "method", dict.fromkeys(fpr95, False)),
    ]
    if len(runs) == 1:
        caption = (
            "Mean rank by AUROC over the data sets, and 95% bootstrap intervals of the gain in "
            "AUROC over the best single expert"
        )
        summary = runs[0].summary
        columns = [name for name in summary if str(name).split()[-1] not in ("AUROC", "FPR@95")]
        ours = summary.loc[summary.index.str.startswith(METHOD), columns]
        tables.append(table_of(ours, caption, "method"))
    text = tuple(
        f"{row}: AUROC {100 * found.auroc:.2f}% on the images of its search."
        for row, found in runs[0].found.items()
    )
    return Section(f"Results{of}", text, tuple(tables))


def _scores(result: Comparison, groups: Sequence[str]) -> list[Score]:
    """The confidences of every method: FuseNorm's, then the others by AUROC."""
    order = result.auroc[list(groups)].mean(axis=1).sort_values(ascending=False).index
    return [
        Score(
            name,
            result.known[name],
            {g: {n: conf[name] for n, conf in result.unknown[g].items()} for g in groups},
        )
        for name in (DEFAULT, *order.drop(DEFAULT))
    ]


def _mean(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over training runs."""
    mean: pd.DataFrame = sum(tables[1:], start=tables[0]) / len(tables)
    return mean
