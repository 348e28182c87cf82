"""APS, the search for settings on a validation pair: many combinations, one pass over images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from fusenorm_openood.detectors.bank import ScoreBank, bank_for
from fusenorm_openood.detectors.fusenorm import Calibration
from fusenorm_openood.detectors.pseudo import pseudo_ood
from fusenorm_openood.detectors.sweep import candidates
from fusenorm_openood.errors import ConfigError, NonFiniteError, ZeroRangeError
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings

# Errors that rule out a combination of settings, but do not end the search.
UNUSABLE = (ConfigError, ZeroRangeError, NonFiniteError)


class Found(NamedTuple):
    """Result of a search.

    Attributes:
        settings: the settings of the best combination.
        calibration: the calibration under these settings.
        auroc: their AUROC on the validation pair, in [0, 1]; the mean over kinds of pseudo-OOD
            images, if these were used.
        trials: one row per combination in OpenOOD's order, with its values and its AUROC in
            percent, or NaN and the reason if the combination is unusable.
    """

    settings: Settings
    calibration: Calibration
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
    bank = bank_for(net, base, sweep).fit(id_loader, progress)
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
    combined, rows, aurocs = candidates(base, sweep), [], []
    for values, settings in combined:
        auroc, reason = np.nan, ""
        try:
            if isinstance(settings, ConfigError):
                raise settings
            known = bank.scored(settings, bank.id_loader).conf
            unknown = [bank.scored(settings, loader).conf for loader in ood_loaders]
            auroc = float(np.mean([ood_metrics(known, conf).auroc for conf in unknown]))
        except UNUSABLE as error:
            reason = str(error)
        aurocs.append(auroc)
        rows.append({**values, "AUROC": 100 * auroc, "unusable": reason})
    if np.isnan(aurocs).all():
        raise ConfigError(
            f"none of {len(rows)} combinations is usable; the first fails: {rows[0]['unusable']}"
        )
    best = int(np.nanargmax(aurocs))  # not of the percentages, which may round to ties
    settings = combined[best].settings
    assert isinstance(settings, Settings)  # it has an AUROC
    return Found(settings, bank.calibration(settings), aurocs[best], pd.DataFrame(rows))
