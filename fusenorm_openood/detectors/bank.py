"""A bank of expert scores: each image is scored once, however many settings are tried."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.base import ExpertScorer, Scored
from fusenorm_openood.detectors.fusenorm import Calibration, FuseNorm, calibrate
from fusenorm_openood.detectors.sweep import swept
from fusenorm_openood.errors import NonFiniteError
from fusenorm_openood.listening.batches import not_finite
from fusenorm_openood.listening.panel import Panel
from fusenorm_openood.listening.react import react_thresholds
from fusenorm_openood.method.experts import Output
from fusenorm_openood.method.settings import Settings


class ScoreBank(ExpertScorer):
    """Expert scores under many settings, from one pass over each image set.

    Args:
        net: any network; it is left unchanged.
        settings: all settings that will be needed.
        outputs: output experts that will be needed on their own.

    Raises:
        ConfigError: settings that do not fit the network.
        TapError: taps that do not fit the network.
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
        """Score the ID validation images, on which every calibration is based."""
        self._kept.clear()
        self._thresholds = react_thresholds(self.net, loader, self.panel.percentiles, progress)
        self.id_loader = loader
        return self.add(loader, progress)

    def add(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score the images of a loader under all settings, unless they already have been."""
        if not self.holds(loader):
            experts, pred, label = self._collect(loader, progress, "APS")
            scored = Scored(np.empty(0), pred, label, experts)
            self._kept[id(loader)] = loader, scored  # keeps the loader, so that its id stays unique
        return self

    def narrowed(self, settings: Iterable[Settings], outputs: Iterable[Output] = ()) -> Self:
        """A bank for a subset of the settings, with the scores that this one already holds."""
        bank = type(self)(self.net, settings, outputs)
        rows = [row for n in bank.panel.norms for row in self.panel.norm_rows(bank.panel.taps, n)]
        rows += [self.panel.output_row(output) for output in bank.panel.outputs]
        for key, (loader, scored) in self._kept.items():
            bank._kept[key] = loader, scored._replace(experts=scored.experts[rows])
        bank._thresholds, bank.id_loader = self._thresholds, self.id_loader
        return bank

    def forget(self, loader: Iterable[Any]) -> None:
        """Discard the scores of a loader's images."""
        del self._kept[id(loader)]

    def holds(self, loader: Iterable[Any]) -> bool:
        """Whether the images of this loader object have been scored."""
        return id(loader) in self._kept

    def knows(self, settings: Settings) -> bool:
        """Whether the bank was built for these settings."""
        return settings in self._detectors

    def calibration(self, settings: Settings) -> Calibration:
        """What `FuseNorm.fit` would learn under these settings.

        Raises:
            ZeroRangeError, NonFiniteError: the statistics cannot be computed under these settings,
                or an image of a held loader has a non-finite score.
        """
        detector = self._detectors[settings]
        rows = self._rows(detector)
        for _, scored in self._kept.values():
            finite = np.isfinite(scored.experts[rows]).all(axis=1)
            if not finite.all():
                expert = detector.experts[int(finite.argmin())]
                raise NonFiniteError(
                    f"expert {expert!r} gives non-finite scores for finite images: leave it out, "
                    "or check the network's weights"
                )
        id_scores = self._kept[id(self.id_loader)][1].experts[rows]
        percentile = settings.react_percentile
        thresholds = {} if percentile is None else {percentile: self._thresholds[percentile]}
        return calibrate(detector.experts, id_scores, thresholds, settings)

    def scored(self, settings: Settings, loader: Iterable[Any]) -> Scored:
        """What `FuseNorm.infer` would return for a loader's images under these settings.

        Raises:
            ZeroRangeError, NonFiniteError: as in `calibration`.
        """
        detector = self._detectors[settings].with_calibration(self.calibration(settings))
        scored = self._kept[id(loader)][1]
        experts = scored.experts[self._rows(detector)]
        return scored._replace(conf=detector.confidence(experts), experts=experts)

    def output(self, output: Output, loader: Iterable[Any]) -> NDArray[np.float64]:
        """Scores `[N]` of a single output expert, larger = more in-distribution."""
        scored = self._kept[id(loader)][1]
        scores: NDArray[np.float64] = scored.experts[self.panel.output_row(output)]
        return scores

    def worst(self, loader: Iterable[Any]) -> Scored:
        """Confidences that rank every ID image below every OOD image: an AUROC of 0."""
        scored = self._kept[id(loader)][1]
        rank = 0.0 if loader is self.id_loader else 1.0
        return scored._replace(conf=np.full(len(scored.pred), rank))

    def _rows(self, detector: FuseNorm) -> list[int]:
        s = detector.settings
        return self.panel.rows(detector.taps, s.feature_norm, s.output_expert)

    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.panel.scores(self.net, images, self._thresholds)

    def _check_finite(self, images: Tensor, experts: NDArray[Any]) -> None:
        """Require finite images; non-finite scores only rule out the settings that use them."""
        finite = images.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            raise not_finite(images, int((~finite).nonzero()[0, 0]), "scores that are not finite")


def bank_for(net: nn.Module, base: Settings, sweep: Mapping[str, Sequence[Any]]) -> ScoreBank:
    """A bank for every combination of a sweep.

    Raises:
        ConfigError: an empty sweep, or a value that is invalid in every combination.
    """
    return ScoreBank(net, swept(base, sweep))
