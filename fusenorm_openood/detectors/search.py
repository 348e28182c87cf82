"""APS, the search for settings on a validation pair: many combinations, one pass over images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.pseudo import pseudo_ood
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import ConfigError, NonFiniteError, ZeroRangeError
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings

# Errors that rule out a combination of settings, but do not end the search.
UNUSABLE = (ConfigError, ZeroRangeError, NonFiniteError)


class Found(NamedTuple):
    """Result of a search.

    Attributes:
        settings: the settings of the best combination.
        statistics: the ID statistics under these settings.
        auroc: their AUROC on the validation pair, in [0, 1]; the mean over kinds of pseudo-OOD
            images, if these were used.
        trials: one row per combination in OpenOOD's order, with its values and its AUROC in
            percent, or NaN and the reason if the combination is unusable.
    """

    settings: Settings
    statistics: DetectorStatistics
    auroc: float
    trials: pd.DataFrame


def search(
    net: nn.Module,
    base: Settings,
    sweep: Mapping[str, Sequence[Any]],
    id_loader: Iterable[Any],
    ood_loader: Iterable[Any] | None = None,
    progress: bool = False,
) -> Found:
    """The settings with the highest AUROC on a validation pair; among equals, the first.

    Every combination is tried, and every image is scored once for all of them.

    Args:
        net: any network; it is left unchanged.
        base: values of the settings that are not searched.
        sweep: the values to try, by setting.
        id_loader: ID validation images, on which the statistics are also fitted.
        ood_loader: OOD validation images; None = pseudo-OOD images made from the ID images, see
            `fusenorm_openood.data.pseudo`.
        progress: whether to show progress bars.

    Raises:
        ConfigError: an empty sweep, or no usable combination in it.
    """
    ood_loaders = pseudo_ood(id_loader) if ood_loader is None else [ood_loader]
    bank = ScoreBank(net, swept(base, sweep)).fit(id_loader, progress)
    for loader in ood_loaders:
        bank.add(loader, progress)
    return choose(bank, base, sweep, ood_loaders)


def choose(
    bank: ScoreBank,
    base: Settings,
    sweep: Mapping[str, Sequence[Any]],
    ood_loaders: Sequence[Iterable[Any]],
) -> Found:
    """The result of `search`, from a bank's scores of all loaders; the mean AUROC counts."""
    rows, usable = [], list[tuple[float, Settings]]()
    for values, settings in candidates(base, sweep):
        auroc, reason = np.nan, ""
        try:
            if isinstance(settings, ConfigError):
                raise settings
            known = bank.scored(settings, bank.id_loader).conf
            unknown = [bank.scored(settings, loader).conf for loader in ood_loaders]
            auroc = float(np.mean([ood_metrics(known, conf).auroc for conf in unknown]))
            usable.append((auroc, settings))
        except UNUSABLE as error:
            reason = str(error)
        rows.append({**values, "AUROC": 100 * auroc, "unusable": reason})
    if not usable:
        raise ConfigError(
            f"none of {len(rows)} combinations is usable; the first fails: {rows[0]['unusable']}"
        )
    auroc, best = max(usable, key=lambda found: found[0])  # of equal ones the first
    return Found(best, bank.statistics(best), auroc, pd.DataFrame(rows))


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
    """The settings of all valid combinations; ConfigError for an empty sweep."""
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
