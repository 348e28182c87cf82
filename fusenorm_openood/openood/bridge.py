"""The way into OpenOOD: whether it is installed, its modules, its base class."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import ImageFile
from torch import nn

from fusenorm_openood.errors import DataError, OpenOODError

INSTALL = "bash scripts/install_openood.sh installs it"


class MinimalBasePostprocessor:
    """The part of OpenOOD's ``BasePostprocessor`` that a subclass relies on."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        """Nothing to set up."""


@contextmanager
def pil_restored() -> Iterator[None]:
    """Take back what importing OpenOOD changes in the process: PIL reads truncated images."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def openood_installed() -> bool:
    """Whether a package ``openood`` is there, without importing it."""
    return find_spec("openood") is not None


def openood_module(name: str) -> Any:
    """The module ``openood.<name>``.

    Raises:
        OpenOODError: OpenOOD is absent or broken.
    """
    if not openood_installed():
        raise OpenOODError(f"OpenOOD is not installed: {INSTALL}")
    try:
        with pil_restored():
            return import_module(f"openood.{name}")
    except Exception as error:  # it imports all its methods and what they need; any may fail
        raise OpenOODError(
            f"OpenOOD is installed and cannot be imported ({type(error).__name__}: {error}): "
            f"{INSTALL}"
        ) from error


def base_postprocessor() -> type[Any]:
    """OpenOOD's ``BasePostprocessor``, or a minimal base of the same contract without OpenOOD."""
    if not openood_installed():
        return MinimalBasePostprocessor
    try:
        base: type[Any] = openood_module("postprocessors").BasePostprocessor
    except OpenOODError as error:
        warnings.warn(
            f"FuseNormPostprocessor is no subclass of OpenOOD's BasePostprocessor: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return MinimalBasePostprocessor
    return base


def openood_config_root() -> Path:
    """The folder of OpenOOD's configurations, which lies beside its package."""
    spec = find_spec("openood")
    if spec is None or not spec.submodule_search_locations:
        raise OpenOODError(f"OpenOOD is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]).parent / "configs"


@contextmanager
def replaced(original: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """Put one of OpenOOD's functions out of use for a while, in all of its modules."""
    rebind(original, other)
    try:
        yield
    finally:
        rebind(other, original)


def rebind(old: Any, new: Any) -> None:
    """Give the new value every name that the old one has in OpenOOD's modules."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "openood":
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


@contextmanager
def file_errors() -> Iterator[None]:
    """Tell in one sentence of a file that OpenOOD cannot read or write."""
    try:
        yield
    except OSError as error:  # one from a worker process holds a traceback as its message
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"OpenOOD cannot read or write a file ({reason}): see that it is there and whole"
        ) from error
