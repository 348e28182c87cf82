"""OpenOOD's `Evaluator`, on any device."""

from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from fusenorm_openood.data.images import truncated_images_read
from fusenorm_openood.devices import device_of, on_device
from fusenorm_openood.errors import OpenOODError
from fusenorm_openood.openood.bridge import file_errors, openood_module


def csid_of_evaluator(id_name: str) -> list[str]:
    """Names of the covariate-shifted sets that OpenOOD's `Evaluator` has for an ID data set."""
    info = openood_module("evaluation_api").evaluator.DATA_INFO.get(id_name, {})
    return list(info.get("csid", {}).get("datasets", []))


def evaluate_with_openood(
    net: nn.Module,
    postprocessor: Any,
    id_name: str,
    data_root: str | Path,
    batch_size: int,
    num_workers: int,
    fsood: bool,
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Table and scores of OpenOOD's `Evaluator`, on the network's device.

    Raises:
        OpenOODError: OpenOOD is absent or broken, or does not know the ID data set.
        DataError: an image cannot be read.
    """
    api = openood_module("evaluation_api")
    if id_name not in api.evaluator.DATA_INFO:
        raise OpenOODError(
            f"OpenOOD's evaluator has no ID data set {id_name!r}: choose --engine native"
        )
    with on_device(device_of(net)), truncated_images_read(), file_errors():
        evaluator = api.Evaluator(
            net,
            id_name=id_name,
            data_root=str(data_root),
            postprocessor=postprocessor,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        table: pd.DataFrame = evaluator.eval_ood(fsood=fsood, progress=progress)
    return table, evaluator.scores
