"""Access to OpenOOD: whether it is installed, its modules, its base class, its evaluator."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import ImageFile
from torch import nn

from fusenorm_openood.data.images import truncated_images
from fusenorm_openood.errors import DataError, OpenOODError
from fusenorm_openood.kernels.devices import device_of, on_device
from fusenorm_openood.openood import INSTALL

_ABSENT = f"OpenOOD is not installed: install it with '{INSTALL}'"


class MinimalBasePostprocessor:
    """The part of OpenOOD's `BasePostprocessor` that a subclass relies on."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        """Nothing to set up."""


def openood_installed() -> bool:
    """Whether a package `openood` is installed, without importing it."""
    return find_spec("openood") is not None


def openood_config_root() -> Path:
    """The folder of OpenOOD's configurations, which is next to its package."""
    spec = find_spec("openood")
    if spec is None or not spec.submodule_search_locations:
        raise OpenOODError(_ABSENT)
    return Path(spec.submodule_search_locations[0]).parent / "configs"


def openood_module(name: str) -> Any:
    """The module `openood.<name>`; OpenOODError if OpenOOD is absent or broken."""
    if not openood_installed():
        raise OpenOODError(_ABSENT)
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        return import_module(f"openood.{name}")
    except Exception as error:  # it imports all its methods' dependencies, and any may fail
        raise OpenOODError(
            f"OpenOOD is installed but cannot be imported ({type(error).__name__}: {error}): "
            f"install it again with '{INSTALL}'"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated  # importing OpenOOD changes it


def base_postprocessor() -> type[Any]:
    """OpenOOD's `BasePostprocessor`, or a minimal class with its interface without OpenOOD."""
    if openood_installed():
        try:
            found: type[Any] = openood_module("postprocessors").BasePostprocessor
            return found
        except OpenOODError as error:
            text = "FuseNormPostprocessor is not a subclass of OpenOOD's BasePostprocessor"
            warnings.warn(f"{text}: {error}", RuntimeWarning, stacklevel=2)
    return MinimalBasePostprocessor


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

    OpenOODError if OpenOOD is absent or broken or lacks the ID data set, DataError if an image
    cannot be read.
    """
    api = openood_module("evaluation_api")
    if id_name not in api.evaluator.DATA_INFO:
        raise OpenOODError(
            f"OpenOOD's evaluator has no ID data set {id_name!r}: choose --engine native"
        )
    how = {"batch_size": batch_size, "num_workers": num_workers}
    with on_device(device_of(net)), truncated_images(read=True), file_errors():
        evaluator = api.Evaluator(net, id_name, str(data_root), postprocessor=postprocessor, **how)
        table: pd.DataFrame = evaluator.eval_ood(fsood=fsood, progress=progress)
    return table, evaluator.scores


def rebind(old: Any, new: Any) -> None:
    """Replace a value by another under every name that it has in OpenOOD's modules."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "openood":
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


@contextmanager
def replaced(original: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace one of OpenOOD's functions in all of its modules."""
    rebind(original, other)
    try:
        yield
    finally:
        rebind(other, original)


@contextmanager
def file_errors() -> Iterator[None]:
    """Report a file that OpenOOD cannot read or write in one sentence."""
    try:
        yield
    except OSError as error:  # from a worker process, its message is a traceback
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"OpenOOD cannot read or write a file ({reason}): check that it exists and is intact"
        ) from error
