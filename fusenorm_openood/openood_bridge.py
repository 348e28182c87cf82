"""Everything taken from OpenOOD, in one place: its base class, its names, its evaluator."""

import ast
import functools
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageFile
from torch import nn

from fusenorm_openood import config as configurations
from fusenorm_openood.devices import on_device
from fusenorm_openood.errors import DataError, OpenOODError
from fusenorm_openood.forward import device_of

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
    """Keep PIL from taking truncated images for whole ones, as OpenOOD, when imported, lets it."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
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
        with whole_images():
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


def register() -> None:
    """Make ``fusenorm`` a name everywhere OpenOOD looks a postprocessor up.

    That is its ``Evaluator`` (``postprocessor_name="fusenorm"``), ``get_postprocessor`` of its
    evaluation API, and the pipelines that its YAML files describe. None of its files is touched,
    other names mean what they did, and a second call changes nothing. Where OpenOOD's folder of
    configurations has no ``postprocessors/fusenorm.yml``, this package's is read.

    Raises:
        OpenOODError: OpenOOD is absent or broken.
    """
    from fusenorm_openood.postprocessor import FuseNormPostprocessor

    api = openood_module("evaluation_api.postprocessor")
    api.postprocessors["fusenorm"] = FuseNormPostprocessor
    by_name: Callable[..., Any] = api.get_postprocessor
    by_config: Callable[..., Any] = openood_module("postprocessors.utils").get_postprocessor

    @functools.wraps(by_name)
    def get_by_name(config_root: str, postprocessor_name: str, id_data_name: str) -> Any:
        if postprocessor_name == "fusenorm":
            own = Path(config_root, "postprocessors", "fusenorm.yml")
            config_root = config_root if own.is_file() else str(configurations.config_root())
        return by_name(config_root, postprocessor_name, id_data_name)

    @functools.wraps(by_config)
    def get_by_config(config: Any) -> Any:
        if config.postprocessor.name == "fusenorm":
            return FuseNormPostprocessor(config)
        return by_config(config)

    pairs: list[tuple[Any, Any]] = [(by_name, get_by_name), (by_config, get_by_config)]
    for original, knowing in pairs:
        if not hasattr(original, "knows_fusenorm"):
            knowing.knows_fusenorm = True
            _rebind(original, knowing)


@contextmanager
def replaced(original: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """Put one of OpenOOD's functions out of use for a while, in all of its modules."""
    _rebind(original, other)
    try:
        yield
    finally:
        _rebind(other, original)


def _rebind(old: Any, new: Any) -> None:
    """Give the new value every name that the old one has in OpenOOD's modules."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "openood":
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


def names_known_to(function: Callable[..., Any]) -> list[str]:
    """The names that one of OpenOOD's ``get_...`` functions knows: they stand in its source only.

    Such a function looks a name up in a dict that it builds, or compares it with one after another.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            nodes += node.keys
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            nodes += node.comparators
    names = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return sorted(names | {"fusenorm"} if hasattr(function, "knows_fusenorm") else names)


def csid_of_evaluator(id_name: str) -> list[str]:
    """Names of the covariate-shifted data sets that OpenOOD's ``Evaluator`` has for an ID set."""
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
) -> "tuple[pd.DataFrame, dict[str, Any]]":
    """Table and scores of OpenOOD's ``Evaluator``, on the device that the network is on.

    Raises:
        OpenOODError: OpenOOD is absent or broken, or does not know the ID data set.
        DataError: an image that cannot be read.
    """
    api = openood_module("evaluation_api")
    if id_name not in api.evaluator.DATA_INFO:
        raise OpenOODError(
            f"OpenOOD's evaluator has no ID data set {id_name!r}: choose --engine native"
        )
    with on_device(device_of(net)), whole_images(), file_errors():
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
