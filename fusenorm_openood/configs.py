"""Read configuration files in OpenOOD's schema."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusenorm_openood.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but numbers such as 1e-3 are numbers, as in YAML 1.2."""


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def config_root() -> Path:
    """The folder of this package's configurations, in the wheel or in the checkout."""
    package = Path(__file__).parent
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
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
            raise ConfigError(
                f"key {'.'.join(keys[: depth + 1])!r} is missing from the configuration: "
                f"found only {known or 'nothing'}"
            )
        value = value[key]
    return value
