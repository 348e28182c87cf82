"""Evaluate a detector on a benchmark: near-OOD, far-OOD and full-spectrum tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.data.benchmarks import Benchmark, image_loader
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.evaluation.runs import Loader
from fusenorm_openood.forward.recorded import Scored
from fusenorm_openood.method.metrics import accuracy, ood_metrics

COLUMNS = ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]


class Evaluation(NamedTuple):
    """Results of one detector on one benchmark."""

    table: pd.DataFrame  # metrics in percent: a row per data set and mean, OpenOOD's columns
    compare: pd.DataFrame  # AUROC / FPR@95 in percent: a row per expert, a column per data set
    scores: dict[str, Any]  # predictions, confidences and labels, as OpenOOD saves them
    sets: dict[str, dict[str, Scored]]  # by group (id, csid, valood, nearood, farood) and name
    detector: Detector | None = None  # None, and no expert scores, if OpenOOD evaluated


def evaluate(
    detector: Detector,
    benchmark: Benchmark,
    fsood: bool = False,
    validation: bool = False,
    load: Loader = image_loader,
    progress: bool = True,
) -> Evaluation:
    """Fit a detector on a benchmark's ID images, mostly those for validation, and test it.

    A detector that is fitted is not fitted again. All images of the benchmark must exist; see
    `Benchmark.missing` and `check_labels`. With `fsood`, covariate-shifted ID images count as ID;
    `validation` tests on the validation pair instead, where settings are to be chosen.
    """
    if fsood and not benchmark.csid:
        raise ConfigError(f"{benchmark.name} has no covariate-shifted ID images: leave out fsood")
    benchmark.check_labels(benchmark.tested(fsood, validation))
    if not detector.is_fitted:
        detector.fit(load(benchmark.id[detector.fitted_on]), progress)
    tested = benchmark.groups(fsood, validation)
    every = [image_set for image_sets in tested.values() for image_set in image_sets.values()]
    loaders = iter(detector.prepare([load(image_set) for image_set in every], progress))
    sets = {
        group: {name: detector.infer(next(loaders), progress, name) for name in image_sets}
        for group, image_sets in tested.items()
    }
    id_sets = id_sets_of(sets)
    id_scores = np.concatenate([with_experts(s) for s in id_sets], axis=1)
    pred, label = (np.concatenate([getattr(s, n) for s in id_sets]) for n in ("pred", "label"))
    acc = accuracy(pred, label)
    metrics = with_means(  # FPR@95, AUROC and both AUPRs [1 + L, 4] of each data set
        {
            group: {n: [*map(ood_metrics, id_scores, with_experts(s))] for n, s in found.items()}
            for group, found in sets.items()
            if group not in ("id", "csid")
        }
    )
    rows = [[*fused, acc] for fused, *_ in metrics.values()]
    table = pd.DataFrame(rows, list(metrics), COLUMNS) * 100
    cells = {
        name: [f"{100 * auroc:.2f} / {100 * fpr95:.2f}" for fpr95, auroc, *_ in found]
        for name, found in metrics.items()
    }
    compare = pd.DataFrame(cells, ["fused", *detector.row_names])
    return Evaluation(table, compare, _openood_scores(sets, benchmark.name), sets, detector)


def id_sets_of(sets: Mapping[str, Mapping[str, Scored]]) -> list[Scored]:
    """The ID sets among `Evaluation.sets`, covariate-shifted ones last."""
    return [scored for group in ("id", "csid") for scored in sets[group].values()]


def with_experts(scored: Scored) -> NDArray[Any]:
    """The confidences and the experts' scores `[1 + L, N]`."""
    return np.vstack([scored.conf[None], scored.experts])


def with_means(groups: Mapping[str, Mapping[str, ArrayLike]]) -> dict[str, NDArray[np.float64]]:
    """The values of each data set, by group; those of a group are followed by their mean."""
    rows: dict[str, NDArray[np.float64]] = {}
    for group, sets in groups.items():
        if sets:
            rows |= {name: np.asarray(values, np.float64) for name, values in sets.items()}
            rows[group] = np.mean([rows[name] for name in sets], axis=0)
    return rows


def summarise(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """`mean ± std` over the tables of several training runs, in OpenOOD's format."""
    stacked = np.stack([table.to_numpy() for table in tables])
    pairs = np.stack([stacked.mean(axis=0), stacked.std(axis=0)], axis=-1)
    cells = [[f"{mean:.2f} \u00b1 {std:.2f}" for mean, std in row] for row in pairs]
    found: pd.DataFrame = pd.DataFrame(cells, tables[0].index, list(tables[0].columns))
    return found


def mean(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over the tables of several training runs."""
    found: pd.DataFrame = sum(tables[1:], start=tables[0]) / len(tables)
    return found


def _openood_scores(sets: Mapping[str, Mapping[str, Scored]], name: str) -> dict[str, Any]:
    listed = {
        group: {n: [s.pred, s.conf, s.label] for n, s in found.items()}
        for group, found in sets.items()
    }
    test, csid = sets["id"][name], sets["csid"]
    return {
        "id": {"train": None, "val": None, "test": listed["id"][name]},
        "csid": listed["csid"],
        "ood": {
            "val": listed["valood"].get("val"),
            "near": listed["nearood"],
            "far": listed["farood"],
        },
        "id_preds": torch.from_numpy(test.pred),
        "id_labels": torch.from_numpy(test.label),
        "csid_preds": {n: torch.from_numpy(s.pred) for n, s in csid.items()},
        "csid_labels": {n: torch.from_numpy(s.label) for n, s in csid.items()},
    }


def sets_of(scores: dict[str, Any], name: str) -> dict[str, dict[str, Scored]]:
    """`Evaluation.sets` without expert scores, from its `scores`; `name`: of the ID data set."""

    def scored(listed: list[Any]) -> Scored:
        pred, conf, label = map(np.asarray, listed)
        return Scored(conf, pred, label, np.zeros((0, len(conf))))

    groups = {"id": {name: scores["id"]["test"]}, "csid": scores["csid"] or {}}
    groups |= {f"{group}ood": scores["ood"][group] or {} for group in ("near", "far")}
    return {
        group: {n: scored(listed) for n, listed in sets.items() if listed is not None}
        for group, sets in groups.items()
    }
