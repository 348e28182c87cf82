"""Expert scores under many settings: each image is scored once, however many are tried."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fusenorm_openood.detectors.fitting import Sample
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.scorer import Scorer, atomic
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import NonFiniteError
from fusenorm_openood.forward.experts import BatchScores, Expert, Experts, Fitted
from fusenorm_openood.forward.recorded import Scored, collect
from fusenorm_openood.method.scores.base import Features, Head, Score
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.fingerprint import Fingerprint
from fusenorm_openood.network.structure import Structure

B = TypeVar("B", bound="ScoreBank")


class ScoreBank(Scorer):
    """Expert scores under many settings, and single scores, from one pass over each image set.

    With `keep_features`, features and logits are kept, too, until their loader is forgotten.
    ConfigError or TapError for settings or taps that do not fit the network.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: Iterable[Settings],
        singles: Iterable[Score] = (),
        keep_features: bool = False,
        structure: Structure | None = None,
    ) -> None:
        self._settings, self._singles = tuple(dict.fromkeys(settings)), tuple(singles)
        allowed = any(s.random == "allow" for s in self._settings)
        super().__init__(net, structure, "allow" if allowed else "refuse")
        self.network: Fingerprint | None = None  # of the fit, if that is known
        self.keep_features, self._features = keep_features, dict[int, Features]()
        self._scored: dict[int, tuple[Iterable[Any], Scored]] = {}
        self.id_loader: Iterable[Any] = ()
        self._detectors: dict[Settings, FuseNorm] = {}
        if self.known_structure is not None:
            self._resolve(self.known_structure)

    def _resolve(self, structure: Structure) -> set[Any]:
        self._detectors = {s: FuseNorm(self.net, s, structure) for s in self._settings}
        self.all_experts = Experts()
        for detector in self._detectors.values():
            self.all_experts |= detector.all_experts
        self.all_experts |= Experts(scores=self._singles)
        return {s.taps for s in self._settings}

    @atomic
    def fit(self, loader: Iterable[Any], progress: bool = False) -> "ScoreBank":
        """Score the ID validation images, on which all ID statistics are based."""
        self._scored, self._features = {}, {}
        self.network, batch = self.fit_on(loader, progress, "APS", may_overflow=True)
        experts = batch.matrix(list(self.all_experts)).numpy()
        scored = Scored(np.empty(0), batch.pred.numpy(), batch.label, experts)
        self._scored[id(loader)] = loader, scored
        if self.keep_features:
            self._features[id(loader)] = batch.features
        self.id_loader = loader
        return self

    def add(self: B, loader: Iterable[Any], progress: bool = False) -> B:
        """Score the images of a loader under all settings, unless they already have been."""
        if not self.holds(loader):
            sample, rows = Sample(math.inf, math.inf), list(self.all_experts)

            def add(batch: BatchScores) -> None:
                sample.add(batch.features)

            each = add if self.keep_features else None
            scoring = self.scoring()
            how = loader, rows, progress, "APS", each, True
            scored = collect(self.net, lambda _: scoring, *how)
            self._scored[id(loader)] = loader, scored  # with the loader, so its id stays unique
            if self.keep_features:
                self._features[id(loader)] = sample.features
        return self

    def narrowed(self, settings: Iterable[Settings], singles: Iterable[Score] = ()) -> "ScoreBank":
        """A bank for a subset of the settings, with the scores that this one already holds."""
        bank = ScoreBank(self.net, settings, singles, self.keep_features, self.known_structure)
        rows = self._rows(list(bank.all_experts))
        for key, (loader, scored) in self._scored.items():
            bank._scored[key] = loader, scored._replace(experts=scored.experts[rows])
        bank.fitted, bank.network, bank.id_loader = self.fitted, self.network, self.id_loader
        bank._features = dict(self._features)
        return bank

    def forget(self, loader: Iterable[Any]) -> None:
        """Discard the scores of a loader's images."""
        del self._scored[id(loader)]
        self._features.pop(id(loader), None)

    def holds(self, loader: Iterable[Any]) -> bool:
        """Whether the images of this loader object have been scored."""
        return id(loader) in self._scored

    def has(self, settings: Settings) -> bool:
        """Whether the bank was built for these settings."""
        return settings in self._settings

    def statistics(self, settings: Settings) -> DetectorStatistics:
        """The ID statistics that `FuseNorm.fit` would find under these settings.

        ZeroRangeError or NonFiniteError if they cannot be computed, or a held score is not finite.
        """
        detector = self._detectors[settings]
        rows = self._rows(detector.rows)
        for _, scored in self._scored.values():
            finite = np.isfinite(scored.experts[rows]).all(axis=1)
            if not finite.all():
                expert = detector.experts[int(finite.argmin())]
                raise NonFiniteError(
                    f"expert {expert!r} gives non-finite scores for finite images: leave it out, "
                    "or check the network's weights"
                )
        id_scores = self._scored[id(self.id_loader)][1].experts[rows]
        scores, f = detector.all_experts.scores, self.fitted
        clips = {score.clip_percentile for score in scores}
        fitted = Fitted(
            {q: threshold for q, threshold in f.thresholds.items() if q in clips},
            {score: f.states[score] for score in scores if score in f.states},
            {score: f.trust[score] for score in scores if score in f.trust},
        )
        return detector.learn(id_scores, fitted, self.network)

    def scored(self, settings: Settings, loader: Iterable[Any]) -> Scored:
        """What `FuseNorm.infer` would return for a loader's images; errors as in `statistics`."""
        detector = self._detectors[settings].adopt(self.statistics(settings))
        scored = self._scored[id(loader)][1]
        experts = scored.experts[self._rows(detector.rows)]
        return scored._replace(conf=detector.confidence(experts), experts=experts)

    def single(self, score: Score, loader: Iterable[Any]) -> NDArray[np.float64]:
        """Scores `[N]` of a loader's images on their own, larger = more in-distribution."""
        (row,) = self._rows([score])
        scores: NDArray[np.float64] = self._scored[id(loader)][1].experts[row]
        return scores

    def features(self, loader: Iterable[Any]) -> Features:
        """Features and logits of a loader's images, with `keep_features`."""
        return self._features[id(loader)]

    def head(self) -> Head:
        """Weight and bias of the network's final layer on the CPU, after `fit`."""
        return self.scoring().head(torch.device("cpu"))

    def worst(self, loader: Iterable[Any]) -> Scored:
        """Confidences that rank every ID image below every OOD image: an AUROC of 0."""
        scored = self._scored[id(loader)][1]
        rank = 0.0 if loader is self.id_loader else 1.0
        return scored._replace(conf=np.full(len(scored.pred), rank))

    def _rows(self, experts: Sequence[Expert]) -> list[int]:
        ours = {expert: row for row, expert in enumerate(self.all_experts)}
        return [ours[expert] for expert in experts]
