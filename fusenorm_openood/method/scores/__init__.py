"""The scores, found by their presence in the modules of this folder: a new one is a new module."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fusenorm_openood.errors import ConfigError, unknown
from fusenorm_openood.method.scores.base import LogitScore, Score


def _classes() -> list[type[Score]]:
    """The classes of all modules, in the order of their names."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Score) and hasattr(value, "name")
        if value.__module__ == module.__name__
    ]


SCORES: dict[str, type[Score]] = {cls.name: cls for cls in _classes()}
LOGIT_SCORES = {n: cls for n, cls in SCORES.items() if issubclass(cls, LogitScore)}
POSTHOC = {n: cls for n, cls in SCORES.items() if n not in LOGIT_SCORES}
# By the setting `output`.
OUTPUTS = {cls.output: cls for cls in LOGIT_SCORES.values() if cls.output}


def make_score(name: str, arguments: Mapping[str, Any] | None = None, **fixed: Any) -> Score:
    """The score of a name, with arguments by OpenOOD's names, and other fixed fields.

    ConfigError for an unknown score or argument, a wrong type or a value outside its range.

    >>> make_score("gen", {"M": 10})
    GEN(gamma=0.1, M=10, mean=False, clamp=None)
    """
    if name not in SCORES:
        raise ConfigError(unknown("score", name, SCORES))
    defaults = SCORES[name].arguments()
    for key in arguments or {}:
        if key not in defaults:
            raise ConfigError(unknown("argument", key, defaults, f" of {name}"))
    try:
        return SCORES[name](**(arguments or {}), **fixed)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
