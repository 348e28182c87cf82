"""Access to OpenOOD: whether it is installed, its modules, its base class."""

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

INSTALL = "bash scripts/install_openood.sh"


class MinimalBasePostprocessor:
    """The part of OpenOOD's `BasePostprocessor` that a subclass relies on."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        """Nothing to set up."""


@contextmanager
def pil_restored() -> Iterator[None]:
    """Restore PIL's setting for truncated images, which importing OpenOOD changes."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def openood_installed() -> bool:
    """Whether a package `openood` is installed, without importing it."""
    return find_spec("openood") is not None


def openood_module(name: str) -> Any:
    """The module `openood.<name>`.

    Raises:
        OpenOODError: OpenOOD is absent or broken.
    """
    if not openood_installed():
        raise OpenOODError(f"OpenOOD is not installed: install it with '{INSTALL}'")
    try:
        with pil_restored():
            return import_module(f"openood.{name}")
    except Exception as error:  # it imports all its methods' dependencies, and any may fail
        raise OpenOODError(
            f"OpenOOD is installed but cannot be imported ({type(error).__name__}: {error}): "
            f"install it again with '{INSTALL}'"
        ) from error


def base_postprocessor() -> type[Any]:
    """OpenOOD's `BasePostprocessor`, or a minimal class with its interface without OpenOOD."""
    if not openood_installed():
        return MinimalBasePostprocessor
    try:
        base: type[Any] = openood_module("postprocessors").BasePostprocessor
    except OpenOODError as error:
        warnings.warn(
            f"FuseNormPostprocessor is not a subclass of OpenOOD's BasePostprocessor: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return MinimalBasePostprocessor
    return base


def openood_config_root() -> Path:
    """The folder of OpenOOD's configurations, which is next to its package."""
    spec = find_spec("openood")
    if spec is None or not spec.submodule_search_locations:
        raise OpenOODError(f"OpenOOD is not installed: install it with '{INSTALL}'")
    return Path(spec.submodule_search_locations[0]).parent / "configs"


@contextmanager
def replaced(original: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace one of OpenOOD's functions in all of its modules."""
    rebind(original, other)
    try:
        yield
    finally:
        rebind(other, original)


def rebind(old: Any, new: Any) -> None:
    """Replace a value by another under every name that it has in OpenOOD's modules."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "openood":
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


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
