"""A bank of expert scores: each image is scored once, however many settings are tried."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.atomic import atomic
from fusenorm_openood.detectors.base import ExpertScorer, Scored, fit_panel
from fusenorm_openood.detectors.fusenorm import Calibration, FuseNorm
from fusenorm_openood.detectors.sweep import swept
from fusenorm_openood.errors import NonFiniteError
from fusenorm_openood.forward.batches import not_finite
from fusenorm_openood.forward.hooks import warn_of_left_out
from fusenorm_openood.forward.observed import Listener, Observed
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.samples import FeatureSample
from fusenorm_openood.method.experts import Output
from fusenorm_openood.method.posthoc import Head, Posthoc, Seen
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.fingerprint import Fingerprint
from fusenorm_openood.network.structure import Structure


class ScoreBank(ExpertScorer):
    """Expert scores under many settings, from one pass over each image set.

    Args:
        net: any network; it is left unchanged.
        settings: all settings that will be needed.
        outputs: output experts that will be needed on their own.
        posthoc: post-hoc experts that will be needed on their own.
        keep_seen: whether to keep features and logits, too, until their loader is forgotten.
        structure: how the network is built, if that is known already.

    Attributes:
        network: what the network is recognised by, after `fit`, if that is known.

    Raises:
        ConfigError: settings that do not fit the network.
        TapError: taps that do not fit the network.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: Iterable[Settings],
        outputs: Iterable[Output] = (),
        posthoc: Iterable[Posthoc] = (),
        keep_seen: bool = False,
        structure: Structure | None = None,
    ) -> None:
        super().__init__(net)
        self._settings, self._outputs = tuple(dict.fromkeys(settings)), tuple(outputs)
        self._posthoc = tuple(posthoc)
        self._random = "allow" if any(s.random == "allow" for s in self._settings) else "refuse"
        self._fitted = Fitted()
        self.network: Fingerprint | None = None
        self._sample: FeatureSample | None = None
        self.keep_seen, self._seen = keep_seen, dict[int, Seen]()
        self._kept: dict[int, tuple[Iterable[Any], Scored]] = {}
        self.id_loader: Iterable[Any] = ()
        self._resolve(structure or self._structure)

    def _resolve(self, structure: Structure | None) -> None:
        """Name the experts of a network that is built like this."""
        self._detectors: dict[Settings, FuseNorm] = {}
        if structure is None:  # until `fit`
            return
        self._detectors = {s: FuseNorm(self.net, s, structure) for s in self._settings}
        outputs, posthoc = self._outputs, self._posthoc
        panels = [detector.panel for detector in self._detectors.values()]
        self.panel = Panel(
            tuple(dict.fromkeys(tap for panel in panels for tap in panel.taps)),
            tuple(dict.fromkeys(norm for panel in panels for norm in panel.norms)),
            tuple(dict.fromkeys([*(o for panel in panels for o in panel.outputs), *outputs])),
            tuple(dict.fromkeys([*(p for panel in panels for p in panel.posthoc), *posthoc])),
        )

    def _try(self, images: Tensor) -> None:
        structure = self.structure(images)
        self._resolve(structure)
        for taps in {s.taps for s in self._settings}:
            warn_of_left_out(self.net, taps, structure)
        unclipped = Fitted({q: float("inf") for q in self.panel.percentiles})
        self.panel.listen(self.net, structure, images, unclipped)

    @atomic
    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score the ID validation images, on which every calibration is based."""
        self._kept, self._seen = {}, {}
        readings = self._begin(loader)
        self.network = self._identified(readings)
        fit = fit_panel(self, self.panel, readings, progress, "APS")
        self._fitted = fit.fitted
        self._kept[id(loader)] = loader, Scored(np.empty(0), fit.pred, fit.label, fit.experts)
        if fit.seen is not None and self.keep_seen:
            self._seen[id(loader)] = fit.seen
        self.id_loader = loader
        return self

    def add(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Score the images of a loader under all settings, unless they already have been."""
        if not self.holds(loader):
            self._sample = FeatureSample(math.inf, math.inf) if self.keep_seen else None
            experts, pred, label = self._collect(loader, progress, "APS")
            scored = Scored(np.empty(0), pred, label, experts)
            self._kept[id(loader)] = loader, scored  # keeps the loader, so that its id stays unique
            if self._sample is not None:
                self._seen[id(loader)] = self._sample.seen
        return self

    def narrowed(
        self,
        settings: Iterable[Settings],
        outputs: Iterable[Output] = (),
        posthoc: Iterable[Posthoc] = (),
    ) -> Self:
        """A bank for a subset of the settings, with the scores that this one already holds."""
        bank = type(self)(self.net, settings, outputs, posthoc, self.keep_seen, self._structure)
        bank._structure = self._structure
        rows = [row for n in bank.panel.norms for row in self.panel.norm_rows(bank.panel.taps, n)]
        rows += [self.panel.output_row(output) for output in bank.panel.outputs]
        rows += [self.panel.posthoc_row(expert) for expert in bank.panel.posthoc]
        for key, (loader, scored) in self._kept.items():
            bank._kept[key] = loader, scored._replace(experts=scored.experts[rows])
        bank._fitted, bank.network, bank.id_loader = self._fitted, self.network, self.id_loader
        bank._seen = dict(self._seen)
        return bank

    def forget(self, loader: Iterable[Any]) -> None:
        """Discard the scores of a loader's images."""
        del self._kept[id(loader)]
        self._seen.pop(id(loader), None)

    def holds(self, loader: Iterable[Any]) -> bool:
        """Whether the images of this loader object have been scored."""
        return id(loader) in self._kept

    def knows(self, settings: Settings) -> bool:
        """Whether the bank was built for these settings."""
        return settings in self._settings

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
        panel = detector.panel
        fitted = Fitted(
            {q: self._fitted.thresholds[q] for q in panel.percentiles},
            {expert: self._fitted.states[expert] for expert in panel.posthoc},
        )
        return detector.learn(id_scores, fitted, self.network)

    def scored(self, settings: Settings, loader: Iterable[Any]) -> Scored:
        """What `FuseNorm.infer` would return for a loader's images under these settings.

        Raises:
            ZeroRangeError, NonFiniteError: as in `calibration`.
        """
        detector = self._detectors[settings].adopt(self.calibration(settings))
        scored = self._kept[id(loader)][1]
        experts = scored.experts[self._rows(detector)]
        return scored._replace(conf=detector.confidence(experts), experts=experts)

    def output(self, output: Output, loader: Iterable[Any]) -> NDArray[np.float64]:
        """Scores `[N]` of a single output expert, larger = more in-distribution."""
        scored = self._kept[id(loader)][1]
        scores: NDArray[np.float64] = scored.experts[self.panel.output_row(output)]
        return scores

    def posthoc(self, expert: Posthoc, loader: Iterable[Any]) -> NDArray[np.float64]:
        """Scores `[N]` of a single post-hoc expert, larger = more in-distribution."""
        scored = self._kept[id(loader)][1]
        scores: NDArray[np.float64] = scored.experts[self.panel.posthoc_row(expert)]
        return scores

    def head(self) -> Head:
        """Weight and bias of the network's head, after `fit`."""
        return self.panel.head(self.net, self._known())

    def seen(self, loader: Iterable[Any]) -> Seen:
        """Features and logits of a loader's images, with `keep_seen`."""
        return self._seen[id(loader)]

    def worst(self, loader: Iterable[Any]) -> Scored:
        """Confidences that rank every ID image below every OOD image: an AUROC of 0."""
        scored = self._kept[id(loader)][1]
        rank = 0.0 if loader is self.id_loader else 1.0
        return scored._replace(conf=np.full(len(scored.pred), rank))

    def _rows(self, detector: FuseNorm) -> list[int]:
        return detector.rows_in(self.panel)

    def _listener(self, recorded: bool = False) -> Listener:
        return self._listener_of(self.panel, self._fitted, recorded)

    def _expert_scores(self, observed: Observed) -> Tensor:
        if self._sample is not None and observed.seen is not None:
            self._sample.add(observed.seen)
        return self.panel.completed(self.net, self._known(), observed, self._fitted)

    def _check_finite(self, images: Tensor | None, experts: NDArray[Any]) -> None:
        """Require finite images; non-finite scores only rule out the settings that use them."""
        if images is None:
            return
        finite = images.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            raise not_finite(images, int((~finite).nonzero()[0, 0]), "scores that are not finite")


def bank_for(net: nn.Module, base: Settings, sweep: Mapping[str, Sequence[Any]]) -> ScoreBank:
    """A bank for every combination of a sweep.

    Raises:
        ConfigError: an empty sweep, or a value that is invalid in every combination.
    """
    return ScoreBank(net, swept(base, sweep))
