"""Register FuseNorm with OpenOOD, and list the names that OpenOOD knows."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.openood.bridge import openood_module, rebind
from fusenorm_openood.openood.postprocessor import FuseNormPostprocessor
from fusenorm_openood.storage import configs


def register() -> None:
    """Register `fusenorm`, `fusenorm_published` and `fusenorm_deviation` with OpenOOD.

    OpenOOD looks them up in its `Evaluator` (`postprocessor_name="fusenorm"`), `get_postprocessor`
    of its evaluation API, and the pipelines in its YAML files. None of OpenOOD's files is changed,
    other names keep their meaning, and a second call has no effect. If OpenOOD's configuration
    folder has no file `postprocessors/NAME.yml`, this package's file is read.

    Raises:
        OpenOODError: OpenOOD is absent or broken.
    """
    api = openood_module("evaluation_api.postprocessor")
    api.postprocessors.update(dict.fromkeys(METHODS, FuseNormPostprocessor))
    by_name: Any = api.get_postprocessor
    by_config: Any = openood_module("postprocessors.utils").get_postprocessor

    @functools.wraps(by_name)
    def get_by_name(config_root: str, postprocessor_name: str, id_data_name: str) -> Any:
        own = Path(config_root, "postprocessors", f"{postprocessor_name}.yml")
        if postprocessor_name in METHODS and not own.is_file():
            config_root = str(configs.config_root())
        return by_name(config_root, postprocessor_name, id_data_name)

    @functools.wraps(by_config)
    def get_by_config(config: Any) -> Any:
        known = config.postprocessor.name in METHODS
        return FuseNormPostprocessor(config) if known else by_config(config)

    pairs: list[tuple[Any, Any]] = [(by_name, get_by_name), (by_config, get_by_config)]
    for original, wrapper in pairs:
        if not hasattr(original, "knows_fusenorm"):
            wrapper.knows_fusenorm = True
            rebind(original, wrapper)


def names_known_to(function: Callable[..., Any]) -> list[str]:
    """The names that one of OpenOOD's `get_...` functions knows, read from its source code.

    Such a function looks the name up in a dict literal, or compares it with one name after another.
    """
    nodes: list[Any] = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Dict):
            nodes += node.keys
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            nodes += node.comparators
    names = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return sorted(names | set(METHODS) if hasattr(function, "knows_fusenorm") else names)
