"""Build a detector from a postprocessor's configuration in OpenOOD's schema."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.search import candidates
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import ConfigError, unknown
from fusenorm_openood.method.scores import SCORES, make_score
from fusenorm_openood.method.settings import METHODS, Settings, check_names
from fusenorm_openood.storage.configs import lookup

NATIVE = (*METHODS, *SCORES)  # postprocessors that need no OpenOOD


class FuseNormConfig(NamedTuple):
    """FuseNorm's settings, their sweep, and whether it is searched, on which OOD images."""

    settings: Settings
    sweep: dict[str, list[Any]]
    # False = not, True = on the validation pair, "pseudo" = on images made from the ID images.
    aps_mode: bool | Literal["pseudo"]


def read_fusenorm(config: Mapping[str, Any]) -> FuseNormConfig:
    """Read the `postprocessor` section; ConfigError for a wrong key, or a value out of range."""
    section = lookup(config, "postprocessor")
    keys = ("name", "APS_mode", "postprocessor_args", "postprocessor_sweep")
    for key in keys:
        lookup(config, "postprocessor", key)
    for key in section:
        if key not in keys:
            raise ConfigError(unknown("key", key, keys, " of postprocessor"))
    if section["APS_mode"] not in (False, True, "pseudo"):
        raise ConfigError(f"APS_mode must be True, False or 'pseudo', got {section['APS_mode']!r}")
    for key in keys[2:]:
        if not isinstance(section[key] or {}, Mapping):
            raise ConfigError(f"{key} must be a mapping of settings or empty, got {section[key]!r}")
    settings = Settings.from_mapping(dict(section["postprocessor_args"] or {}))
    sweep = dict(section["postprocessor_sweep"] or {})
    check_names(sweep)
    aps_mode = section["APS_mode"]
    # Without a search, the sweep need not be compatible with the chosen settings.
    methods = [] if aps_mode else [method() for method in METHODS.values()]
    _check_sweep([settings, *methods], sweep)
    return FuseNormConfig(settings, sweep, aps_mode)


def _check_sweep(bases: Sequence[Settings], sweep: Mapping[str, list[Any]]) -> None:
    """Raise ConfigError unless the sweep's values are valid with one of the bases."""
    errors = []
    for base in bases:
        try:
            candidates(base, sweep)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == len(bases):
        raise errors[0]


def detector_for(
    name: str, config: Mapping[str, Any], input_std: tuple[float, ...] | None = None
) -> Callable[[nn.Module], Detector]:
    """A function that builds the configured detector, one of `NATIVE`, for a network.

    Images are divided by `input_std`, for the step of `odin`. ConfigError for an invalid section.
    """
    if name in METHODS:
        settings = read_fusenorm(config).settings
        return lambda net: FuseNorm(net, settings)
    args = dict(lookup(config, "postprocessor").get("postprocessor_args") or {})
    random = args.pop("random", "refuse")
    fixed = {"input_std": input_std} if name == "odin" else {}
    score = make_score(name, args, **fixed)
    return lambda net: SingleScore(net, score, random)
