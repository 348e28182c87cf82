"""APS, the search for settings on a validation pair: many combinations, one pass over images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fusenorm_openood.data.pseudo import KINDS, RANDOM
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import ConfigError, NonFiniteError, ZeroRangeError
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.storage.stored import row_batches

SEED = 0  # of pseudo-OOD images
# Errors that rule out a combination of settings, but do not end the search.
UNUSABLE = (ConfigError, ZeroRangeError, NonFiniteError)

LISTS = (Sequence, np.ndarray)  # of a setting's values


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

    Examples:
        >>> from fusenorm_openood.network import CifarResNet
        >>> ids, oods = [torch.rand(100, 3, 32, 32)], [torch.zeros(9, 3, 32, 32)]
        >>> found = search(CifarResNet(8), Settings(), {"cap": [2, 5], "trust": [True]}, ids, oods)
        >>> list(found.trials), len(found.trials)
        (['cap', 'trust', 'AUROC', 'unusable'], 2)
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

    ConfigError for a value that is invalid in every combination.
    """
    combined: list[dict[str, Any]] = [{}]
    for name, values in sweep.items():
        if isinstance(values, str | bytes) or not isinstance(values, LISTS) or not len(values):
            raise ConfigError(
                f"postprocessor_sweep.{name} must be a non-empty list of values, got {values!r}"
            )
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


class PseudoOOD:
    """Pseudo-OOD images of one of `KINDS`, made from ID images; the same in every pass."""

    def __init__(self, loader: Iterable[Any], kind: str, seed: int = SEED) -> None:
        self.loader, self.kind, self.seed = loader, kind, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for images, _ in batches(self.loader):
            yield KINDS[self.kind](images, generator)


class PseudoImages(Dataset[dict[str, Any]]):
    """The images of a `PseudoOOD` by number; the batch of the last one is kept.

    They are made in batches from ID images of one size, in OpenOOD's format.
    """

    def __init__(self, images: Dataset[Any], kind: str, batch_size: int, seed: int = SEED) -> None:
        self.images, self.kind = images, kind
        rows = range(len(images))  # type: ignore[arg-type]
        self.batches = row_batches(rows, batch_size)
        self._batch_of = [number for number, batch in enumerate(self.batches) for _ in batch]
        self._states = [torch.Generator().manual_seed(seed).get_state()]  # before each batch
        self._made: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._batch_of)

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch = self._batch_of[number]
        if self._made is None or self._made[0] != batch:
            self._made = batch, self._make(batch)
        return {"data": self._made[1][number - self.batches[batch].start], "label": -1}

    def _make(self, number: int) -> Tensor:
        images = torch.stack([self.images[row]["data"] for row in self.batches[number]])
        generator = torch.Generator()
        if self.kind in RANDOM:
            while len(self._states) <= number:  # what is drawn depends on the shapes alone
                generator.set_state(self._states[-1])
                skipped = self.batches[len(self._states) - 1]
                KINDS[self.kind](images.new_zeros(len(skipped), *images.shape[1:]), generator)
                self._states.append(generator.get_state())
            generator.set_state(self._states[number])
        return KINDS[self.kind](images, generator)


def pseudo_ood(loader: Iterable[Any], kinds: Iterable[str] = tuple(KINDS)) -> list[Iterable[Any]]:
    """One loader for each kind of pseudo-OOD image, recorded if the given one is."""
    if isinstance(loader, RecordedLoader):
        return [_recorded(loader, kind) for kind in kinds]
    return [PseudoOOD(loader, kind) for kind in kinds]


def _recorded(loader: RecordedLoader, kind: str) -> RecordedLoader:
    made_of = {"pseudo": kind, "seed": SEED, "batch_size": loader.batch_size}
    return replace(
        loader,
        dataset=PseudoImages(loader.dataset, kind, loader.batch_size),
        record={**loader.record, **made_of},
        name=f"{loader.name}_{kind}",
    )
