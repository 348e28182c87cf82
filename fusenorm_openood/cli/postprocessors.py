"""The configuration of a postprocessor, with changes from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusenorm_openood.configs import config_root, lookup, parse_yaml, read_config
from fusenorm_openood.detectors.configuration import NATIVE
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.openood.bridge import INSTALL, openood_config_root, openood_installed


def read_postprocessor(
    name: str,
    path: str | Path | None = None,
    changes: Sequence[str] = (),
    sweep: Sequence[str] = (),
    aps_mode: bool = False,
) -> dict[str, Any]:
    """The configuration of a postprocessor, with `KEY=VALUE` changes to its arguments and sweep.

    Without a path, this package's configuration of that name is read, or else OpenOOD's.

    Raises:
        ConfigError: an unknown postprocessor, or a change that is not `KEY=VALUE`.
    """
    if name not in NATIVE and not openood_installed():
        raise ConfigError(
            f"unknown postprocessor {name!r}: choose from {', '.join(NATIVE)}, or install "
            f"OpenOOD, which has more, with '{INSTALL}'"
        )
    if path is None:
        ours = config_root() / "postprocessors" / f"{name}.yml"
        path = ours if ours.is_file() else openood_config_root() / "postprocessors" / ours.name
    config = read_config(path)
    section = lookup(config, "postprocessor")
    for option, given, part in (
        ("--set", changes, "postprocessor_args"),
        ("--sweep", sweep, "postprocessor_sweep"),
    ):
        for change in given:
            key, equals, value = change.partition("=")
            if not equals:
                raise ConfigError(
                    f"{option} must be KEY=VALUE, for example alpha=0.5, got {change!r}"
                )
            section[part] = {**(section.get(part) or {}), key: parse_yaml(value)}
    if aps_mode:
        section["APS_mode"] = True
    return config
