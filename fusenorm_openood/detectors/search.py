"""APS, the search for settings on a validation pair: many combinations, one pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from fusenorm_openood.detectors.bank import ScoreBank, bank_for
from fusenorm_openood.detectors.fusenorm import Calibration
from fusenorm_openood.detectors.sweep import candidates
from fusenorm_openood.errors import ConfigError, NonFiniteError, ZeroRangeError
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings

# What makes a combination of settings unusable, and not the search.
UNUSABLE = (ConfigError, ZeroRangeError, NonFiniteError)


class Found(NamedTuple):
    """What a search found.

    settings: of the best combination.
    calibration: what was learnt under them.
    auroc: on the validation pair, in [0, 1].
    trials: a row a combination in OpenOOD's order, its values and its AUROC in percent, NaN where
        the combination is unusable, with the reason.
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
    ood_loader: Iterable[Any],
    progress: bool = False,
) -> Found:
    """The settings of the highest AUROC on a validation pair, the first of equals.

    Args:
        net: any network; it stays as it is.
        base: the settings that are not searched.
        sweep: lists of values by setting.
        id_loader: ID validation images, which the statistics are fitted on, too.
        ood_loader: OOD validation images.
        progress: show bars.

    Raises:
        ConfigError: an empty sweep, or no usable combination in it.
    """
    bank = bank_for(net, base, sweep).fit(id_loader, progress).add(ood_loader, progress)
    return choose(bank, base, sweep, ood_loader)


def choose(
    bank: ScoreBank,
    base: Settings,
    sweep: Mapping[str, Sequence[Any]],
    ood_loader: Iterable[Any],
) -> Found:
    """What :func:`search` finds, from the scores that a bank holds of both loaders."""
    combined, rows, aurocs = candidates(base, sweep), [], []
    for values, settings in combined:
        auroc, reason = np.nan, ""
        try:
            if isinstance(settings, ConfigError):
                raise settings
            known, unknown = (bank.scored(settings, x) for x in (bank.id_loader, ood_loader))
            auroc = ood_metrics(known.conf, unknown.conf).auroc
        except UNUSABLE as error:
            reason = str(error)
        aurocs.append(auroc)
        rows.append({**values, "AUROC": 100 * auroc, "unusable": reason})
    if np.isnan(aurocs).all():
        raise ConfigError(
            f"none of {len(rows)} combinations is usable, the first because {rows[0]['unusable']}"
        )
    best = int(np.nanargmax(aurocs))  # percentages would round different values to one
    settings = combined[best].settings
    assert isinstance(settings, Settings)  # it has an AUROC
    return Found(settings, bank.calibration(settings), aurocs[best], pd.DataFrame(rows))
