"""From a postprocessor's configuration, in OpenOOD's schema, to a detector."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fusenorm_openood.configs import lookup
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.baselines import BASELINES, Baseline, check_baseline
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.sweep import candidates
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.settings import Settings, check_names

NATIVE = ("fusenorm", *BASELINES)  # postprocessors that need no OpenOOD


class FuseNormConfig(NamedTuple):
    """What a configuration in OpenOOD's schema says of FuseNorm."""

    settings: Settings
    sweep: dict[str, list[Any]]
    aps_mode: bool


def read_fusenorm(config: Mapping[str, Any]) -> FuseNormConfig:
    """Read and check the ``postprocessor`` section of a configuration.

    Raises:
        ConfigError: a missing or unknown key, or a value out of range.
    """
    section = lookup(config, "postprocessor")
    keys = ("name", "APS_mode", "postprocessor_args", "postprocessor_sweep")
    for key in keys:
        lookup(config, "postprocessor", key)
    unknown = [key for key in section if key not in keys]
    if unknown:
        raise ConfigError(
            f"key 'postprocessor.{unknown[0]}' unknown: the keys are {', '.join(keys)}"
        )
    if not isinstance(section["APS_mode"], bool):
        raise ConfigError(f"APS_mode = {section['APS_mode']!r} found: choose True or False")
    for key in keys[2:]:
        if not isinstance(section[key] or {}, Mapping):
            raise ConfigError(
                f"{key} = {section[key]!r} found: give a mapping of settings, or leave it empty"
            )
    settings = Settings.from_mapping(dict(section["postprocessor_args"] or {}))
    sweep = dict(section["postprocessor_sweep"] or {})
    check_names(sweep)
    for name, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"postprocessor_sweep.{name} = {values!r}: give a list of values")
    aps_mode = section["APS_mode"]
    # A sweep that waits for a search need not go with settings that are chosen without it.
    candidates(settings if aps_mode else Settings(), sweep)
    return FuseNormConfig(settings, sweep, aps_mode)


def detector_for(
    name: str, config: Mapping[str, Any], input_std: tuple[float, ...] | None = None
) -> Callable[[nn.Module], Detector]:
    """A function from a network to the detector that a configuration describes.

    Args:
        name: one of :data:`NATIVE`.
        config: configuration with the section ``postprocessor``.
        input_std: standard deviations that images are divided by, for the step of ``odin``.

    Raises:
        ConfigError: a configuration that the detector cannot be made from.
    """
    if name == "fusenorm":
        settings = read_fusenorm(config).settings
        return lambda net: FuseNorm(net, settings)
    args = lookup(config, "postprocessor").get("postprocessor_args") or {}
    check_baseline(name, args)
    return lambda net: Baseline(net, name, input_std if name == "odin" else None, **args)
