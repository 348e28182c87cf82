"""The configuration of a postprocessor, with changes from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusenorm_openood.configs import config_root, lookup, parse_yaml, read_config
from fusenorm_openood.detectors.configuration import NATIVE
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.openood.bridge import INSTALL, openood_config_root, openood_installed


def read_postprocessor(
    name: str | None = None,
    config: str | None = None,
    changes: Sequence[str] = (),
    sweep: Sequence[str] = (),
    aps_mode: bool | str = False,
) -> dict[str, Any]:
    """The configuration of a postprocessor, with `KEY=VALUE` changes to its arguments and sweep.

    Its `postprocessor.name` is the name under which results are reported.

    Args:
        name: the postprocessor's name; None = that in the file, or `fusenorm` without a file.
        config: its file, or the name of one of this package's; None = this package's file of the
            postprocessor's name, or else OpenOOD's.
        changes: `KEY=VALUE` changes to its arguments.
        sweep: `KEY=LIST` changes to its sweep.
        aps_mode: the value of `APS_mode`; False = as in the file.

    Raises:
        ConfigError: an unknown postprocessor, or a change that is not `KEY=VALUE`.
    """
    ours = {path.stem: path for path in (config_root() / "postprocessors").glob("*.yml")}
    named = name or ("fusenorm" if config is None else None)
    if named is not None and named not in NATIVE and not openood_installed():
        raise ConfigError(
            f"unknown postprocessor {named!r}: choose from {', '.join(NATIVE)}, or install "
            f"OpenOOD, which has more, with '{INSTALL}'"
        )
    if config is not None:
        path = ours.get(config, Path(config))
    elif named in ours:
        path = ours[str(named)]
    else:
        path = openood_config_root() / "postprocessors" / f"{named}.yml"
    read = read_config(path)
    section = lookup(read, "postprocessor")
    # One of FuseNorm's methods is never reported under the name of another.
    if named is not None and not (named in METHODS and section.get("name") in METHODS):
        section["name"] = named
    lookup(read, "postprocessor", "name")
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
        section["APS_mode"] = aps_mode
    return read
