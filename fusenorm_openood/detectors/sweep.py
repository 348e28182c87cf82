"""A sweep: a list of values per setting, and all of their combinations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.settings import Settings


class Candidate(NamedTuple):
    """One combination of a sweep: its settings, or the error if they are incompatible."""

    values: dict[str, Any]
    settings: Settings | ConfigError


def candidates(base: Settings, sweep: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """Every combination of a sweep's values, in OpenOOD's order: the first key varies fastest.

    Raises:
        ConfigError: a value that is invalid in every combination.
    """
    combined: list[dict[str, Any]] = [{}]
    for name, values in sweep.items():
        combined = [{**before, name: value} for value in values for before in combined]
    found = [Candidate(values, _try_settings(base, values)) for values in combined]
    for name, values in sweep.items():
        for value in values:
            outcomes = [c.settings for c in found if c.values[name] is value]
            if all(isinstance(outcome, ConfigError) for outcome in outcomes):
                raise ConfigError(f"postprocessor_sweep.{name}: {outcomes[0]}")
    return found


def swept(base: Settings, sweep: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """The settings of all valid combinations; see `bank_for`."""
    if not sweep:
        raise ConfigError(
            "postprocessor_sweep is empty, so there is nothing to search: "
            "give a list of values for at least one setting, or set APS_mode to False"
        )
    settings = (candidate.settings for candidate in candidates(base, sweep))
    return [s for s in settings if isinstance(s, Settings)]


def _try_settings(base: Settings, values: Mapping[str, Any]) -> Settings | ConfigError:
    try:
        return base.replace(**values)
    except ConfigError as error:
        return error
