"""Read configuration files in OpenOOD's schema, and values of JSON as the types they were."""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from fusenorm_openood.errors import ConfigError

MOST = 2**63  # numbers beyond it, infinity and NaN are refused where JSON has numbers


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but numbers such as 1e-3 are numbers, as in YAML 1.2."""


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def config_root() -> Path:
    """The folder of this package's configurations, in the wheel or in the checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError if there is none."""
    path = Path(path)
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        siblings = ", ".join(sorted(p.stem for p in path.parent.glob("*.yml")))
        raise ConfigError(
            f"configuration {path} cannot be read ({error.strerror}): its folder contains "
            f"{siblings or 'no YAML files'}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path} must be in UTF-8: convert it ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must contain a mapping, got {type(config).__name__}")
    return config


def parse_yaml(text: str, source: str | Path = "the value") -> Any:
    """The value of a YAML text; ConfigError if it is invalid."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def lookup(config: Mapping[str, Any], *keys: str) -> Any:
    """The value under nested keys; ConfigError naming the first key that is missing."""
    value: Any = config
    for depth, key in enumerate(keys):
        if not isinstance(value, Mapping) or key not in value:
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
            raise ConfigError(
                f"key {'.'.join(keys[: depth + 1])!r} is missing from the configuration: "
                f"found only {found or 'nothing'}"
            )
        value = value[key]
    return value


def typed(kind: Any, value: Any, name: str) -> Any:
    """A value of a type, from what JSON has made of it: tuples are lists there, records mappings.

    The type is a dataclass, a NamedTuple, a tuple, a mapping with keys of strings, a union, a plain
    type or `Any`. ConfigError, which names the part, for a value of another type, or a number that
    is too large or not finite.
    """
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any and not isinstance(value, int | float):
        return value
    if outer in (Union, UnionType):
        errors = []
        for one in inner:
            try:
                return typed(one, value, name)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if outer is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(typed(one, item, f"{name}[{number}]") for number, (one, item) in items)
    elif isinstance(value, Mapping) and (is_dataclass(kind) or hasattr(kind, "_fields")):
        hints = get_type_hints(kind)
        parts = {k: typed(hints.get(k, Any), v, f"{name}.{k}") for k, v in value.items()}
        try:
            return kind(**parts)
        except (TypeError, ConfigError) as error:  # a field is unknown, missing or out of range
            raise ConfigError(f"{name} is invalid ({error})") from None
    elif isinstance(value, Mapping) and isinstance(outer, type) and issubclass(outer, Mapping):
        return {key: typed(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    elif isinstance(value, int | float):
        # An integer may stand for a float; Python's bool is an int to isinstance, not here.
        kinds = (Any, type(value), float if type(value) is int else Any)
        if kind in kinds and abs(value) < MOST:
            return value
    elif type(value) is kind:
        return value
    raise ConfigError(f"{name} must be {getattr(kind, '__name__', kind)}, got {str(value)[:60]!r}")
