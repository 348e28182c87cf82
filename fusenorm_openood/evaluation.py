"""Near-OOD, far-OOD and full-spectrum tables, in OpenOOD's format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, image_loader
from fusenorm_openood.errors import CheckpointError, ConfigError
from fusenorm_openood.metrics import accuracy, ood_metrics
from fusenorm_openood.networks.checkpoints import check_classes, load_network
from fusenorm_openood.networks.kind import network_kind
from fusenorm_openood.runs import find_checkpoints as find_checkpoints
from fusenorm_openood.scoring import Detector, Scored

COLUMNS = ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]


class Evaluation(NamedTuple):
    """What one detector reaches on one benchmark.

    table: metrics in percent, a row a data set and one for each mean, OpenOOD's columns.
    compare: AUROC / FPR@95 in percent, a row an expert, a column a data set or mean.
    scores: predictions, confidences and labels in the nested dict that OpenOOD saves.
    """

    table: pd.DataFrame
    compare: pd.DataFrame
    scores: dict[str, Any]


def evaluate(
    detector: Detector,
    benchmark: Benchmark,
    fsood: bool = False,
    validation: bool = False,
    batch_size: int = 200,
    num_workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Fit a detector on a benchmark's ID validation images, and test it.

    Args:
        detector: a detector around the network to test; one that is fitted is taken as it is.
        benchmark: images that are all there; see :meth:`Benchmark.missing`.
        fsood: count covariate-shifted ID images as ID.
        validation: test on the validation pair instead, ID validation images against OOD
            validation images: settings are chosen there, never on what is tested.
        batch_size, num_workers: of the loaders.
        progress: show a bar for each data set.

    Raises:
        ConfigError: ``fsood`` for a benchmark without covariate-shifted images.
    """
    check_fsood(benchmark, fsood)

    def infer(image_set: ImageSet, name: str) -> Scored:
        return detector.infer(loader(image_set), progress, name)

    def loader(image_set: ImageSet) -> Any:
        return image_loader(image_set, batch_size, num_workers)

    if not detector.is_fitted:
        detector.fit(loader(benchmark.id["val"]), progress)
    test = infer(benchmark.id["val" if validation else "test"], benchmark.name)
    csid = {name: infer(s, name) for name, s in benchmark.csid.items()} if fsood else {}
    val = {"val": infer(benchmark.val_ood, "val")} if validation else {}
    near = {} if validation else {name: infer(s, name) for name, s in benchmark.near.items()}
    far = {} if validation else {name: infer(s, name) for name, s in benchmark.far.items()}

    known = [test, *csid.values()]
    id_conf = np.concatenate([s.conf for s in known])
    id_experts = np.concatenate([s.experts for s in known], axis=1)
    acc = accuracy(
        np.concatenate([s.pred for s in known]), np.concatenate([s.label for s in known])
    )
    rows, compared = {}, {}
    for group, sets in (("valood", val), ("nearood", near), ("farood", far)):
        if not sets:
            continue
        metrics = {name: ood_metrics(id_conf, s.conf) for name, s in sets.items()}
        rows.update(metrics)
        rows[group] = np.mean(list(metrics.values()), axis=0)
        by_expert = {name: _expert_metrics(id_experts, s.experts) for name, s in sets.items()}
        compared.update(by_expert)
        compared[group] = np.mean(list(by_expert.values()), axis=0)
    table = pd.DataFrame([[*row, acc] for row in rows.values()], list(rows), COLUMNS) * 100

    fused = {n: f"{100 * rows[n][1]:.2f} / {100 * rows[n][0]:.2f}" for n in rows}
    single = {
        expert: {n: "{:.2f} / {:.2f}".format(*100 * compared[n][i]) for n in compared}
        for i, expert in enumerate(detector.rows)
    }
    compare = pd.DataFrame({"fused": fused, **single}).T
    return Evaluation(table, compare, _scores(test, csid, val, near, far))


def summarise(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """``mean ± std`` over the tables of several training runs, as OpenOOD writes it."""
    stacked = np.stack([table.to_numpy() for table in tables])
    mean, std = stacked.mean(axis=0), stacked.std(axis=0)
    cells = [
        [f"{m:.2f} \u00b1 {s:.2f}" for m, s in zip(*row, strict=True)]
        for row in zip(mean, std, strict=True)
    ]
    summary: pd.DataFrame = pd.DataFrame(cells, tables[0].index, list(tables[0].columns))
    return summary


def load_runs(checkpoints: Mapping[str, Path], num_classes: int) -> dict[str, nn.Module]:
    """The networks of the training runs under one root, which must be of one kind.

    Args:
        checkpoints: run -> file; see :func:`find_checkpoints`.
        num_classes: number of classes of the ID data set.

    Raises:
        CheckpointError: a file that holds no known network; runs that differ in architecture,
            training method or number of classes; another number of classes than the data set's.
    """
    networks = {run: load_network(path) for run, path in checkpoints.items()}
    (first, kind), *others = [(run, network_kind(net)) for run, net in networks.items()]
    for run, other in others:
        if other != kind:
            raise CheckpointError(
                f"runs of different kinds under one root: {checkpoints[first]} is a {kind}, "
                f"{checkpoints[run]} is a {other}: give each kind a root of its own"
            )
    check_classes(checkpoints[first], kind.classes, num_classes)
    return networks


def check_fsood(benchmark: Benchmark, fsood: bool) -> None:
    """ConfigError for full-spectrum on a benchmark without covariate-shifted ID images."""
    if fsood and not benchmark.csid:
        raise ConfigError(f"{benchmark.name} has no covariate-shifted ID images: leave out --fsood")


def _expert_metrics(id_experts: Any, ood_experts: Any) -> Any:
    """AUROC and FPR@95 of each expert ``[L, 2]``."""
    pairs = zip(id_experts, ood_experts, strict=True)
    return np.array([[m.auroc, m.fpr95] for m in (ood_metrics(i, o) for i, o in pairs)])


def _scores(
    test: Scored,
    csid: dict[str, Scored],
    val: dict[str, Scored],
    near: dict[str, Scored],
    far: dict[str, Scored],
) -> dict[str, Any]:
    def listed(s: Scored) -> list[Any]:
        return [s.pred, s.conf, s.label]

    return {
        "id": {"train": None, "val": None, "test": listed(test)},
        "csid": {name: listed(s) for name, s in csid.items()},
        "ood": {
            "val": listed(val["val"]) if val else None,
            "near": {name: listed(s) for name, s in near.items()},
            "far": {name: listed(s) for name, s in far.items()},
        },
        "id_preds": torch.from_numpy(test.pred),
        "id_labels": torch.from_numpy(test.label),
        "csid_preds": {name: torch.from_numpy(s.pred) for name, s in csid.items()},
        "csid_labels": {name: torch.from_numpy(s.label) for name, s in csid.items()},
    }
