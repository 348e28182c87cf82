"""The experts of a FuseNorm by name: the layers that are tapped, and which experts are strong."""

from collections.abc import Sequence

from torch import nn

from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import ConfigError, unknown
from fusenorm_openood.forward.taps import check_taps, first_of_last_stage, resolve_taps
from fusenorm_openood.method.scores import OUTPUTS, POSTHOC
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import unwrapped
from fusenorm_openood.network.structure import Structure

NO_LAYERS = ("output", *POSTHOC)  # experts that are not feature norms of a layer
Names = tuple[tuple[str, ...], tuple[str, ...]]  # of the layers, and of the strong experts


def names_of(net: nn.Module, settings: Settings, structure: Structure | None) -> Names | None:
    """The names under some settings; None where the network's structure would have to be known.

    Raises:
        TapError: taps that do not fit the network.
        ConfigError: a strong expert that is unknown, or named twice.
    """
    taps, strong = check_taps(net, settings.taps), settings.strong
    if structure is not None:
        taps = resolve_taps(net, settings.taps, structure)
        if isinstance(strong, str):
            return taps, (first_of_last_stage(structure, taps), "output")
    if taps and not isinstance(strong, str):
        return taps, _strong(settings, strong, taps)
    if not isinstance(strong, str):  # any module may turn out to be a layer to tap
        modules = dict(unwrapped(net).named_modules())
        names = [name for name in strong if isinstance(name, str) and name not in modules]
        _strong(settings, names, ())
    return None


def names_of_fit(net: nn.Module, settings: Settings, statistics: DetectorStatistics) -> Names:
    """The names under some settings with the layers of an earlier fit; errors as in `names_of`."""
    check_taps(net, statistics.layers)
    if settings.strong == statistics.settings.strong:
        return statistics.layers, statistics.strong
    if isinstance(settings.strong, str):
        raise ConfigError("strong='auto' needs the network's stages: fit again")
    return statistics.layers, _strong(settings, settings.strong, statistics.layers)


def check_experts(statistics: DetectorStatistics, experts: Sequence[str]) -> None:
    """Raise ConfigError unless these are the experts of a fit."""
    if set(statistics.experts) != set(experts):
        raise ConfigError(
            f"the ID statistics must have the detector's experts {', '.join(experts)}, got "
            f"{', '.join(statistics.experts)}: fit again"
        )


def _strong(
    settings: Settings, experts: Sequence[str | int], taps: Sequence[str]
) -> tuple[str, ...]:
    strong = []
    for expert in experts:
        number = expert if isinstance(expert, int) else None
        if number is not None and not 0 <= number < len(taps):
            raise ConfigError(
                f"strong expert {number} is out of range: there are {len(taps)} taps, "
                f"numbered from 0: {', '.join(taps)}"
            )
        name = expert if isinstance(expert, str) else taps[expert]
        name = "output" if name == settings.output else name
        if name not in (*taps, *NO_LAYERS):
            of = f" with output={settings.output!r}"
            known = (*(taps or ["the taps"]), *NO_LAYERS)
            more = f", or set output={name!r}" if name in OUTPUTS else ""
            raise ConfigError(unknown("strong expert", name, known, of, more))
        strong.append(name)
    if len(set(strong)) != len(strong):
        raise ConfigError(f"strong must name each expert once, got {', '.join(strong)}")
    return tuple(strong)
