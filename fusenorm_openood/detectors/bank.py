"""Expert scores under many settings: each image is scored once, however many are tried."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fusenorm_openood.detectors.atomic import atomic
from fusenorm_openood.detectors.base import (
    Scored,
    begin,
    collect,
    identified,
    known_structure,
    prepared,
)
from fusenorm_openood.detectors.fitting import fit_experts, leave_one_out, try_experts
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import NonFiniteError
from fusenorm_openood.forward.experts import BatchScores, Expert, Experts, Fitted, Scoring
from fusenorm_openood.forward.recorded import batch_scores
from fusenorm_openood.forward.samples import Sample
from fusenorm_openood.forward.taps import warn_of_left_out
from fusenorm_openood.method.scores.base import Features, Head, Score
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.fingerprint import Fingerprint
from fusenorm_openood.network.structure import Structure

B = TypeVar("B", bound="ScoreBank")


class ScoreBank:
    """Expert scores under many settings, from one pass over each image set.

    Args:
        net: any network; it is left unchanged.
        settings: all settings that will be needed.
        singles: scores that will be needed on their own.
        keep_features: whether to keep features and logits, too, until their loader is forgotten.
        structure: how the network is built, if that is known already.

    Attributes:
        network: what the network is recognised by, after `fit`, if that is known.

    Raises:
        ConfigError, TapError: settings or taps that do not fit the network.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: Iterable[Settings],
        singles: Iterable[Score] = (),
        keep_features: bool = False,
        structure: Structure | None = None,
    ) -> None:
        self.net, self._structure = net, known_structure(net, structure)
        self._settings, self._singles = tuple(dict.fromkeys(settings)), tuple(singles)
        self._fitted = Fitted()
        self.network: Fingerprint | None = None
        self.keep_features, self._features = keep_features, dict[int, Features]()
        self._scored: dict[int, tuple[Iterable[Any], Scored]] = {}
        self.id_loader: Iterable[Any] = ()
        self._experts = Experts()
        self._detectors: dict[Settings, FuseNorm] = {}
        if self._structure is not None:
            self._resolve(self._structure)

    @property
    def known_structure(self) -> Structure | None:
        """How the network is built, None before `fit`."""
        return self._structure

    def _resolve(self, structure: Structure) -> None:
        """Name the experts of a network that is built like this."""
        self._detectors = {s: FuseNorm(self.net, s, structure) for s in self._settings}
        self._experts = Experts()
        for detector in self._detectors.values():
            self._experts |= detector.all_experts
        self._experts |= Experts(scores=self._singles)

    def scoring(self) -> Scoring:
        """How the images are scored, after `fit`."""
        assert self._structure is not None
        return Scoring(self.net, self._structure, self._experts, self._fitted)

    def prepare(self, loaders: Iterable[Any], progress: bool = False) -> list[Any]:
        """Let recorded loaders score their images before any is waited for; see `prepared`."""
        scoring = self.scoring()
        return prepared(self.net, lambda _: scoring, loaders, progress)

    @atomic
    def fit(self, loader: Iterable[Any], progress: bool = False) -> "ScoreBank":
        """Score the ID validation images, on which all ID statistics are based."""
        self._scored, self._features, self._fitted = {}, {}, Fitted()
        random = "allow" if any(s.random == "allow" for s in self._settings) else "refuse"
        readings, structure, images = begin(self.net, loader, self._structure, random)
        self._structure = structure
        if images is not None:
            self._resolve(structure)
            for taps in {s.taps for s in self._settings}:
                warn_of_left_out(self.net, taps, structure)
            try_experts(self.scoring(), images)
        self.network = identified(self.net, readings)
        self._fitted, batch = fit_experts(
            self.scoring(), readings, progress, "APS", may_overflow=True
        )
        batch = leave_one_out(self.scoring(), batch)
        experts = batch.matrix(list(self._experts)).numpy()
        scored = Scored(np.empty(0), batch.pred.numpy(), batch.label, experts)
        self._scored[id(loader)] = loader, scored
        if self.keep_features:
            self._features[id(loader)] = batch.features
        self.id_loader = loader
        return self

    def add(self: B, loader: Iterable[Any], progress: bool = False) -> B:
        """Score the images of a loader under all settings, unless they already have been."""
        if not self.holds(loader):
            sample, rows = Sample(math.inf, math.inf), list(self._experts)

            def add(batch: BatchScores) -> None:
                sample.add(batch.features)

            each = add if self.keep_features else None
            scoring = self.scoring()
            batches = batch_scores(self.net, lambda _: scoring, loader, progress, "APS")
            scored = collect(batches, rows, each, may_overflow=True)
            self._scored[id(loader)] = loader, scored  # with the loader, so its id stays unique
            if self.keep_features:
                self._features[id(loader)] = sample.features
        return self

    def narrowed(self, settings: Iterable[Settings], singles: Iterable[Score] = ()) -> "ScoreBank":
        """A bank for a subset of the settings, with the scores that this one already holds."""
        bank = ScoreBank(self.net, settings, singles, self.keep_features, self._structure)
        rows = self._rows(list(bank._experts))
        for key, (loader, scored) in self._scored.items():
            bank._scored[key] = loader, scored._replace(experts=scored.experts[rows])
        bank._fitted, bank.network, bank.id_loader = self._fitted, self.network, self.id_loader
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
        experts, states = detector.all_experts, self._fitted.states
        kept = {score: states[score] for score in experts.scores if score in states}
        fitted = Fitted(
            {q: self._fitted.thresholds[q] for q in experts.percentiles},
            kept,
            {score: t for score, t in self._fitted.trust.items() if score in kept},
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
        """Weight and bias of the network's final layer, after `fit`."""
        return self.scoring().head()

    def worst(self, loader: Iterable[Any]) -> Scored:
        """Confidences that rank every ID image below every OOD image: an AUROC of 0."""
        scored = self._scored[id(loader)][1]
        rank = 0.0 if loader is self.id_loader else 1.0
        return scored._replace(conf=np.full(len(scored.pred), rank))

    def _rows(self, experts: Sequence[Expert]) -> list[int]:
        ours = {expert: row for row, expert in enumerate(self._experts)}
        return [ours[expert] for expert in experts]
