"""Tables in OpenOOD's format: one row per data set, and one per group with its mean."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

COLUMNS = ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]


def with_means(groups: Mapping[str, Mapping[str, ArrayLike]]) -> dict[str, NDArray[np.float64]]:
    """Figures by data set, with the mean of each group after its data sets.

    Args:
        groups: `{group: {data set: figures}}`, for example `{"nearood": {"tin": ...}}`; a
            group without data sets is left out.
    """
    rows: dict[str, NDArray[np.float64]] = {}
    for group, sets in groups.items():
        if sets:
            figures = {name: np.asarray(values, np.float64) for name, values in sets.items()}
            rows |= figures
            rows[group] = np.mean(list(figures.values()), axis=0)
    return rows


def summarise(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """`mean ± std` over the tables of several training runs, in OpenOOD's format."""
    stacked = np.stack([table.to_numpy() for table in tables])
    mean, std = stacked.mean(axis=0), stacked.std(axis=0)
    cells = [
        [f"{m:.2f} \u00b1 {s:.2f}" for m, s in zip(*row, strict=True)]
        for row in zip(mean, std, strict=True)
    ]
    summary: pd.DataFrame = pd.DataFrame(cells, tables[0].index, list(tables[0].columns))
    return summary


def mean_ranks(auroc: pd.DataFrame) -> "pd.Series[float]":
    """Mean rank of each method (row) over data sets (columns): 1 = highest AUROC, ties averaged."""
    ranks: pd.Series[float] = auroc.rank(ascending=False).mean(axis=1)
    return ranks
