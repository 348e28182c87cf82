"""The report about a comparison of methods."""

from collections.abc import Mapping, Sequence

import pandas as pd

from fusenorm_openood.benchmark.comparison import GROUPS as MEANS
from fusenorm_openood.benchmark.comparison import Comparison
from fusenorm_openood.report.content import Facts, Figure, Report, Section
from fusenorm_openood.report.figures import dots
from fusenorm_openood.report.scores import Score, histograms_section, roc_section
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
    sections = [_root(name, runs, len(results) > 1) for name, runs in results.items()]
    root, runs = next(iter(results.items()))
    scores = _scores(runs[0])
    several = len(results) > 1 or len(runs) > 1
    which = (f"Of the first training run of {root}.",) if several else ()
    for section in (roc_section(scores), histograms_section(scores[:SHOWN])):
        sections.append(Section(section.title, (*which, *section.text), (), section.figures))
    auroc = _mean([run.auroc for run in runs])
    highlights = [
        (f"{GROUPS[group]} AUROC, {name}", f"{auroc.loc[name, group]:.2f} %")
        for group in MEANS
        if group in auroc
        for name in (METHOD, _best_other(auroc[group]))
    ]
    numbers = [("ID images", len(scores[0].known))]
    numbers += [(f"{GROUPS[g]} images", len(scores[0].pooled(g))) for g in scores[0].unknown]
    about = (*facts, *((name, f"{number:,}") for name, number in numbers))
    return Report(title, about, tuple(highlights), tuple(sections))


def _root(name: str, runs: Sequence[Comparison], named: bool) -> Section:
    auroc, fpr95 = (_mean([getattr(run, which) for run in runs]) for which in ("auroc", "fpr95"))
    over = f", mean over {len(runs)} training runs" if len(runs) > 1 else ""
    tables = [
        table_of(auroc, f"AUROC in percent{over}; the best is underlined", "method", _all(auroc, True)),
        table_of(fpr95, f"FPR@95 in percent{over}; the best is underlined", "method", _all(fpr95, False)),
    ]
    if len(runs) == 1:
        caption = (
            "Ranks, and 95 % bootstrap intervals of the gain in AUROC over the best single expert"
        )
        kept = [c for c in runs[0].summary if not c.endswith(("AUROC", "FPR@95"))]
        tables.append(table_of(runs[0].summary[kept], caption, "method"))
    text = tuple(
        f"{row}: AUROC {100 * found.auroc:.2f} on its search images."
        for row, found in runs[0].found.items()
    )
    return Section(f"Results, {name}" if named else "Results", text, tuple(tables), (_dots(auroc),))


def _dots(auroc: pd.DataFrame) -> Figure:
    groups = [group for group in MEANS if group in auroc]
    order = auroc[groups].mean(axis=1).sort_values(ascending=False).index
    shares = {
        GROUPS[group]: {str(name): float(auroc.loc[name, group]) for name in order}
        for group in groups
    }
    return dots("AUROC of every method, best mean first", shares, "AUROC, %")


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


def _all(table: pd.DataFrame, largest: bool) -> dict[object, bool]:
    return dict.fromkeys(table.columns, largest)


def _mean(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    mean: pd.DataFrame = sum(tables[1:], start=tables[0]) / len(tables)
    return mean
