"""Evaluate a detector on a benchmark: near-OOD, far-OOD and full-spectrum tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.detectors.base import Detector, Scored
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.evaluation.records import Loader, plain_loader
from fusenorm_openood.method.metrics import accuracy, ood_metrics

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


class Evaluation(NamedTuple):
    """Results of one detector on one benchmark.

    Attributes:
        table: metrics in percent, one row per data set and per mean, with OpenOOD's columns.
        compare: AUROC / FPR@95 in percent, one row per expert, one column per data set or mean.
        scores: predictions, confidences and labels, in the nested dict that OpenOOD saves.
        sets: what the detector gave for each data set, by group (`id`, `csid`, `valood`, `nearood`,
            `farood`) and name.
        detector: the fitted detector; None if OpenOOD evaluated, and then there are no expert
            scores.
    """

    table: pd.DataFrame
    compare: pd.DataFrame
    scores: dict[str, Any]
    sets: dict[str, dict[str, Scored]]
    detector: Detector | None = None


def evaluate(
    detector: Detector,
    benchmark: Benchmark,
    fsood: bool = False,
    validation: bool = False,
    batch_size: int = 200,
    num_workers: int = 0,
    progress: bool = True,
    loader: Loader | None = None,
) -> Evaluation:
    """Fit a detector on a benchmark's ID images, mostly those for validation, and test it.

    Args:
        detector: detector for the network to test; it is fitted unless it already is.
        benchmark: a benchmark whose images all exist; see `Benchmark.missing`.
        fsood: whether covariate-shifted ID images count as ID.
        validation: whether to test on the validation pair instead, ID validation images against
            OOD validation images; choose settings there, never on test images.
        batch_size, num_workers: settings of the data loaders.
        progress: whether to show a progress bar per data set.
        loader: loads an image set, for example with `Records.loader`; None = with the settings
            above.

    Raises:
        ConfigError: `fsood` for a benchmark without covariate-shifted images.
        DataError: a label of an ID image that is no class of the benchmark.
    """
    check_fsood(benchmark, fsood)
    benchmark.check_labels(benchmark.tested(fsood, validation))

    load = loader or plain_loader(batch_size, num_workers)

    if not detector.is_fitted:
        detector.fit(load(benchmark.id[detector.fitted_on]), progress)
    tested: dict[str, dict[str, ImageSet]] = {
        "id": {benchmark.name: benchmark.id["val" if validation else "test"]},
        "csid": benchmark.csid if fsood else {},
        "valood": {"val": benchmark.val_ood} if validation else {},
        "nearood": {} if validation else benchmark.near,
        "farood": {} if validation else benchmark.far,
    }
    named = [(group, name, s) for group, sets in tested.items() for name, s in sets.items()]
    loaders = detector.prepare([load(image_set) for *_, image_set in named], progress)
    groups: dict[str, dict[str, Scored]] = {group: {} for group in tested}
    for (group, name, _), images in zip(named, loaders, strict=True):
        groups[group][name] = detector.infer(images, progress, name)

    test, csid = groups.pop("id")[benchmark.name], groups.pop("csid")
    known = [test, *csid.values()]
    id_conf = np.concatenate([s.conf for s in known])
    id_experts = np.concatenate([s.experts for s in known], axis=1)
    acc = accuracy(
        np.concatenate([s.pred for s in known]), np.concatenate([s.label for s in known])
    )
    rows = with_means(_each(groups, lambda s: ood_metrics(id_conf, s.conf)))
    table = pd.DataFrame([[*row, acc] for row in rows.values()], list(rows), COLUMNS) * 100
    compared = with_means(_each(groups, lambda s: _expert_metrics(id_experts, s.experts)))
    fused = {n: f"{100 * rows[n][1]:.2f} / {100 * rows[n][0]:.2f}" for n in rows}
    single = {
        expert: {n: "{:.2f} / {:.2f}".format(*100 * compared[n][i]) for n in compared}
        for i, expert in enumerate(detector.row_names)
    }
    compare = pd.DataFrame({"fused": fused, **single}).T
    sets = {"id": {benchmark.name: test}, "csid": csid, **groups}
    return Evaluation(table, compare, _scores(test, csid, groups), sets, detector)


def sets_of(scores: dict[str, Any], name: str) -> dict[str, dict[str, Scored]]:
    """`Evaluation.sets` without expert scores, from the nested dict that OpenOOD saves.

    Args:
        scores: see `Evaluation.scores`.
        name: name of the ID data set.
    """

    def scored(listed: list[Any]) -> Scored:
        pred, conf, label = map(np.asarray, listed)
        return Scored(conf, pred, label, np.zeros((0, len(conf))))

    found = {"id": {name: scores["id"]["test"]}, "csid": scores["csid"] or {}}
    found |= {f"{group}ood": scores["ood"][group] or {} for group in ("near", "far")}
    return {
        group: {n: scored(listed) for n, listed in sets.items() if listed is not None}
        for group, sets in found.items()
    }


def check_fsood(benchmark: Benchmark, fsood: bool) -> None:
    """Raise ConfigError for `fsood` on a benchmark without covariate-shifted ID images."""
    if fsood and not benchmark.csid:
        raise ConfigError(f"{benchmark.name} has no covariate-shifted ID images: leave out --fsood")


def _expert_metrics(id_experts: Any, ood_experts: Any) -> Any:
    """AUROC and FPR@95 of each expert `[L, 2]`."""
    pairs = zip(id_experts, ood_experts, strict=True)
    return np.array([[m.auroc, m.fpr95] for m in (ood_metrics(i, o) for i, o in pairs)])


def _each(
    groups: dict[str, dict[str, Scored]], figures: Callable[[Scored], Any]
) -> dict[str, dict[str, Any]]:
    """The figures of every data set in every group."""
    return {group: {n: figures(s) for n, s in sets.items()} for group, sets in groups.items()}


def _scores(
    test: Scored, csid: dict[str, Scored], groups: dict[str, dict[str, Scored]]
) -> dict[str, Any]:
    def listed(s: Scored) -> list[Any]:
        return [s.pred, s.conf, s.label]

    return {
        "id": {"train": None, "val": None, "test": listed(test)},
        "csid": {name: listed(s) for name, s in csid.items()},
        "ood": {
            "val": next(map(listed, groups["valood"].values()), None),
            "near": {name: listed(s) for name, s in groups["nearood"].items()},
            "far": {name: listed(s) for name, s in groups["farood"].items()},
        },
        "id_preds": torch.from_numpy(test.pred),
        "id_labels": torch.from_numpy(test.label),
        "csid_preds": {name: torch.from_numpy(s.pred) for name, s in csid.items()},
        "csid_labels": {name: torch.from_numpy(s.label) for name, s in csid.items()},
    }
