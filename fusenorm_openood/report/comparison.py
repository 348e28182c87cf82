"""The report about a comparison of methods."""

from collections.abc import Mapping, Sequence

import pandas as pd

from fusenorm_openood.evaluation.comparison import GROUPS as MEANS
from fusenorm_openood.evaluation.comparison import Comparison
from fusenorm_openood.report.charts import dots
from fusenorm_openood.report.evaluation import Score, histograms_section, roc_section
from fusenorm_openood.report.page import Facts, Figure, Report, Section
from fusenorm_openood.report.sections import GROUPS, table_of

SHOWN = 6  # methods whose distributions are drawn
METHOD = "FuseNorm"


def report_of_comparison(
    results: Mapping[str, Sequence[Comparison]], title: str, facts: Facts = ()
) -> Report:
    """The report about a comparison.

    Args:
        results: results of each training run, by the name of their root.
        title: what was compared.
        facts: more to say in the header.
    """
    sections = []
    for name, runs in results.items():
        of = f", {name}" if len(results) > 1 else ""
        sections += [_at_a_glance(runs, of), _root(runs, of)]
    root, runs = next(iter(results.items()))
    scores = _scores(runs[0])
    several = len(results) > 1 or len(runs) > 1
    which = (f"Of the first training run of {root}.",) if several else ()
    for section in (roc_section(scores), histograms_section(scores[:SHOWN])):
        sections.append(Section(section.title, (*which, *section.text), (), section.figures))
    auroc, _ = _means(runs)
    highlights = [
        (f"{GROUPS[group]} AUROC, {name}", f"{dict(auroc[group])[name]:.2f}%")
        for group in MEANS
        if group in auroc
        for name in (METHOD, _best_other(auroc[group]))
    ]
    numbers = [("ID images", len(scores[0].known))]
    numbers += [(f"{GROUPS[g]} images", len(scores[0].pooled(g))) for g in scores[0].unknown]
    about = (*facts, *((name, f"{number:,}") for name, number in numbers))
    return Report(title, about, tuple(highlights), tuple(sections))


def _at_a_glance(runs: Sequence[Comparison], of: str) -> Section:
    """Near- and far-OOD figures of every method, best first."""
    auroc, fpr95 = _means(runs)
    groups = [group for group in MEANS if group in auroc]

    def chart(title: str, table: pd.DataFrame, ascending: bool) -> Figure:
        order = table[groups].mean(axis=1).sort_values(ascending=ascending).index
        shares = {
            GROUPS[group]: {str(name): float(table.loc[name, group]) for name in order}
            for group in groups
        }
        return dots(f"{title} of every method, best mean first", shares, f"{title}, %")

    figures = chart("AUROC", auroc, False), chart("FPR@95", fpr95, True)
    return Section(f"At a glance{of}", figures=figures)


def _root(runs: Sequence[Comparison], of: str) -> Section:
    auroc, fpr95 = _means(runs)
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
        kept = [name for name in summary if str(name).split()[-1] not in ("AUROC", "FPR@95")]
        ours = [name for name in summary.index if str(name).startswith(METHOD)]
        tables.append(table_of(summary.loc[ours, kept], caption, "method"))
    text = tuple(
        f"{row}: AUROC {100 * found.auroc:.2f}% on the images of its search."
        for row, found in runs[0].found.items()
    )
    return Section(f"Results{of}", text, tuple(tables))


def _scores(result: Comparison) -> list[Score]:
    """The confidences of every method: FuseNorm's, then the others by AUROC."""
    groups = [group for group in MEANS if group in result.auroc]
    order = result.auroc[groups].mean(axis=1).sort_values(ascending=False).index
    names = [METHOD, *(str(name) for name in order if name != METHOD)]
    return [
        Score(
            name,
            result.known[name],
            {
                group: {n: conf[name] for n, conf in result.unknown[group].items()}
                for group in groups
            },
        )
        for name in names
    ]


def _best_other(auroc: "pd.Series[float]") -> str:
    """The best method that is not FuseNorm's."""
    others = [name for name in auroc.index if not str(name).startswith(METHOD)]
    return str(auroc[others].idxmax())


def _means(runs: Sequence[Comparison]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """AUROC and FPR@95 in percent, means over training runs."""
    return _mean([run.auroc for run in runs]), _mean([run.fpr95 for run in runs])


def _mean(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    mean: pd.DataFrame = sum(tables[1:], start=tables[0]) / len(tables)
    return mean
