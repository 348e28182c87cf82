"""Everything taken from OpenOOD, in one place: its base class and its evaluator."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import ImageFile
from torch import nn

from fusenorm_openood.errors import OpenOODError

if TYPE_CHECKING:
    import pandas as pd

INSTALL = "bash scripts/install_openood.sh installs it"


class MinimalBasePostprocessor:
    """The part of OpenOOD's ``BasePostprocessor`` that a subclass relies on."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        """Nothing to set up."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Keep OpenOOD, when imported, from letting PIL take truncated images for whole ones."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def openood_installed() -> bool:
    """Whether a package ``openood`` is there, without importing it."""
    return find_spec("openood") is not None


def base_postprocessor() -> type[Any]:
    """OpenOOD's ``BasePostprocessor``, or a minimal base of the same contract without OpenOOD."""
    if not openood_installed():
        return MinimalBasePostprocessor
    try:
        with whole_images():
            base: type[Any] = import_module("openood.postprocessors").BasePostprocessor
    except Exception as error:  # it imports all its methods and what they need; any may fail
        warnings.warn(
            f"OpenOOD is installed and cannot be imported ({type(error).__name__}: {error}), so "
            f"FuseNormPostprocessor is no subclass of its BasePostprocessor: {INSTALL}",
            RuntimeWarning,
            stacklevel=2,
        )
        return MinimalBasePostprocessor
    return base


def evaluate_with_openood(
    net: nn.Module,
    postprocessor: Any,
    id_name: str,
    data_root: str | Path,
    batch_size: int,
    num_workers: int,
    fsood: bool,
    progress: bool,
) -> "tuple[pd.DataFrame, dict[str, Any]]":
    """Table and scores of OpenOOD's ``Evaluator``, on the device that the network is on.

    The evaluator's own passes for the accuracy need CUDA. They are not run: predictions come with
    the scores, and are handed to it.

    Raises:
        OpenOODError: OpenOOD is absent or broken, or does not know the ID data set.
    """
    api = _evaluation_api()
    if id_name not in api.evaluator.DATA_INFO:
        raise OpenOODError(
            f"OpenOOD's evaluator has no ID data set {id_name!r}: choose --engine native"
        )
    evaluator = api.Evaluator(
        net,
        id_name=id_name,
        data_root=str(data_root),
        postprocessor=postprocessor,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    scores, loaders = evaluator.scores, evaluator.dataloader_dict
    scores["id"]["test"] = list(postprocessor.inference(net, loaders["id"]["test"], progress))
    scores["id_preds"], _, scores["id_labels"] = map(torch.as_tensor, scores["id"]["test"])
    if fsood:
        for name, loader in loaders["csid"].items():
            scores["csid"][name] = list(postprocessor.inference(net, loader, progress))
            pred, _, label = scores["csid"][name]
            scores["csid_preds"][name] = torch.as_tensor(pred)
            scores["csid_labels"][name] = torch.as_tensor(label)
    table: pd.DataFrame = evaluator.eval_ood(fsood=fsood, progress=progress)
    return table, scores


def _evaluation_api() -> Any:
    if not openood_installed():
        raise OpenOODError(f"OpenOOD is not installed: {INSTALL}, or choose --engine native")
    try:
        with whole_images():
            return import_module("openood.evaluation_api")
    except Exception as error:
        raise OpenOODError(
            f"OpenOOD is installed and cannot be imported ({type(error).__name__}: {error}): "
            f"{INSTALL}, or choose --engine native"
        ) from error
