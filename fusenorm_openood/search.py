"""APS, the search for parameters on a validation pair: many combinations, one pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detector import Calibration, FuseNorm, calibrate
from fusenorm_openood.errors import ConfigError, NonFiniteError, ZeroRangeError
from fusenorm_openood.experts import Output
from fusenorm_openood.metrics import ood_metrics
from fusenorm_openood.panel import Panel
from fusenorm_openood.react import react_thresholds
from fusenorm_openood.scoring import ExpertScorer, Scored, not_finite
from fusenorm_openood.settings import Settings, candidates

# What makes a combination of settings unusable, and not the search.
UNUSABLE = (ConfigError, ZeroRangeError, NonFiniteError)


class ScoreBank(ExpertScorer):
    """Expert scores of many settings, each image set passed over once.

    Args:
        net: any network; it stays as it is.
        settings: all settings that will be asked for.
        outputs: output experts that will be asked for alone.

    Raises:
        ConfigError, TapError: settings that do not fit the network.
    """

    def __init__(
        self, net: nn.Module, settings: Iterable[Settings], outputs: Iterable[Output] = ()
    ) -> None:
        super().__init__(net)
        self._detectors = {s: FuseNorm(net, s) for s in dict.fromkeys(settings)}
        self.panel = Panel(
            tuple(dict.fromkeys(tap for d in self._detectors.values() for tap in d.taps)),
            tuple(dict.fromkeys(s.feature_norm for s in self._detectors)),
            tuple(dict.fromkeys([*(s.output_expert for s in self._detectors), *outputs])),
        )
        norms = [f"{tap} {norm}" for norm in self.panel.norms for tap in self.panel.taps]
        self.experts = (*norms, *(str(output) for output in self.panel.outputs))
        self._thresholds: dict[float, float] = {}
        self._kept: dict[int, tuple[Iterable[Any], Scored]] = {}
        self.id_loader: Iterable[Any] = ()

    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score the ID validation images, which every calibration is made from."""
        self._kept.clear()
        self._thresholds = react_thresholds(self.net, loader, self.panel.percentiles, progress)
        self.id_loader = loader
        return self.add(loader, progress)

    def add(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score the images of a loader under all settings, unless that has been done."""
        if not self.holds(loader):
            experts, pred, label = self._collect(loader, progress, "APS")
            scored = Scored(np.empty(0), pred, label, experts)
            self._kept[id(loader)] = loader, scored  # the loader too, so that its id stays its own
        return self

    def narrowed(self, settings: Iterable[Settings], outputs: Iterable[Output] = ()) -> Self:
        """A bank for fewer settings, with the scores of the loaders that this one holds."""
        bank = type(self)(self.net, settings, outputs)
        rows = [row for n in bank.panel.norms for row in self.panel.norm_rows(bank.panel.taps, n)]
        rows += [self.panel.output_row(output) for output in bank.panel.outputs]
        for key, (loader, scored) in self._kept.items():
            bank._kept[key] = loader, scored._replace(experts=scored.experts[rows])
        bank._thresholds, bank.id_loader = self._thresholds, self.id_loader
        return bank

    def forget(self, loader: Iterable[Any]) -> None:
        """Free the scores of a loader's images."""
        del self._kept[id(loader)]

    def holds(self, loader: Iterable[Any]) -> bool:
        """Whether the images of this very loader have been scored."""
        return id(loader) in self._kept

    def knows(self, settings: Settings) -> bool:
        """Whether these settings are among those that the bank was made for."""
        return settings in self._detectors

    def calibration(self, settings: Settings) -> Calibration:
        """What :meth:`FuseNorm.fit` would learn under these settings.

        Raises:
            ZeroRangeError, NonFiniteError: settings under which nothing can be learnt, or under
                which an image of a loader that is held has a score that is not finite.
        """
        detector = self._detectors[settings]
        rows = self._rows(detector)
        for _, scored in self._kept.values():
            finite = np.isfinite(scored.experts[rows]).all(axis=1)
            if not finite.all():
                expert = detector.experts[int(finite.argmin())]
                raise NonFiniteError(
                    f"expert {expert!r} gives scores that are not finite to finite images: leave "
                    "it out, or look at the network's weights"
                )
        id_scores = self._kept[id(self.id_loader)][1].experts[rows]
        percentile = settings.react_percentile
        thresholds = {} if percentile is None else {percentile: self._thresholds[percentile]}
        return calibrate(detector.experts, id_scores, thresholds, settings)

    def scored(self, settings: Settings, loader: Iterable[Any]) -> Scored:
        """What :meth:`FuseNorm.infer` would say of a loader's images under these settings.

        Raises:
            ZeroRangeError, NonFiniteError: settings under which nothing can be learnt.
        """
        detector = self._detectors[settings].with_calibration(self.calibration(settings))
        scored = self._kept[id(loader)][1]
        experts = scored.experts[self._rows(detector)]
        return scored._replace(conf=detector.confidence(experts), experts=experts)

    def output(self, output: Output, loader: Iterable[Any]) -> NDArray[np.float64]:
        """Scores ``[N]`` of one output expert alone, larger = more in-distribution."""
        scored = self._kept[id(loader)][1]
        scores: NDArray[np.float64] = scored.experts[self.panel.output_row(output)]
        return scores

    def worst(self, loader: Iterable[Any]) -> Scored:
        """Confidences that rank every ID image below every other: an AUROC of 0."""
        scored = self._kept[id(loader)][1]
        rank = 0.0 if loader is self.id_loader else 1.0
        return scored._replace(conf=np.full(len(scored.pred), rank))

    def _rows(self, detector: FuseNorm) -> list[int]:
        s = detector.settings
        return self.panel.rows(detector.taps, s.feature_norm, s.output_expert)

    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.panel.scores(self.net, images, self._thresholds)

    def _check_finite(self, images: Tensor, experts: NDArray[Any]) -> None:
        """An image must be finite; scores that are not only rule out the settings they are of."""
        finite = images.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            raise not_finite(images, int((~finite).nonzero()[0, 0]), "scores that are not finite")


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


def bank_for(net: nn.Module, base: Settings, sweep: Mapping[str, Sequence[Any]]) -> ScoreBank:
    """A bank for every combination of a sweep.

    Raises:
        ConfigError: an empty sweep, or a value that no combination can use.
    """
    return ScoreBank(net, swept(base, sweep))


def swept(base: Settings, sweep: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """The settings of every combination whose values go together; see :func:`bank_for`."""
    if not sweep:
        raise ConfigError(
            "postprocessor_sweep is empty, so there is nothing to search: "
            "give it lists of values by setting, or set APS_mode to False"
        )
    settings = (candidate.settings for candidate in candidates(base, sweep))
    return [s for s in settings if isinstance(s, Settings)]


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
    combined, rows = candidates(base, sweep), []
    for values, settings in combined:
        auroc, reason = np.nan, ""
        try:
            if isinstance(settings, ConfigError):
                raise settings
            known, unknown = (bank.scored(settings, x) for x in (bank.id_loader, ood_loader))
            auroc = ood_metrics(known.conf, unknown.conf).auroc
        except UNUSABLE as error:
            reason = str(error)
        rows.append({**values, "AUROC": 100 * auroc, "unusable": reason})
    trials = pd.DataFrame(rows)
    if trials["AUROC"].isna().all():
        raise ConfigError(
            f"none of {len(rows)} combinations is usable, the first because {rows[0]['unusable']}"
        )
    best = int(trials["AUROC"].idxmax())
    settings = combined[best].settings
    assert isinstance(settings, Settings)  # it has an AUROC
    return Found(settings, bank.calibration(settings), trials["AUROC"][best] / 100, trials)
