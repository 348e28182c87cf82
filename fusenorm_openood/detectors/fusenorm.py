"""The FuseNorm detector, for any torch network; it does not need OpenOOD."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.errors import ConfigError, DataError, NotFittedError
from fusenorm_openood.listening.panel import Panel
from fusenorm_openood.listening.react import react_thresholds
from fusenorm_openood.listening.taps import first_of_last_stage, resolve_taps
from fusenorm_openood.method.experts import DEFAULT_TEMPERATURE, Output
from fusenorm_openood.method.fusion import fuse
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.statistics import IDStatistics, compute_id_statistics, normalise


@dataclass(frozen=True)
class Calibration:
    """What `FuseNorm.fit` learns; it can be pickled without the network."""

    experts: tuple[str, ...]
    react_thresholds: dict[float, float]
    id_scores: NDArray[np.float64]
    statistics: IDStatistics


class FuseNorm(Detector):
    """OOD detector that fuses the feature norms of all residual blocks with an output expert.

    Args:
        net: any network that returns logits `[B, K]`; it is left unchanged.
        settings: all settings at once; None = the published ones.
        changes: individual settings by name; see `Settings`.

    Attributes:
        experts: names of the experts: the taps in order, and `"output"`.
        strong: names of the strong experts; the others are weak.
        calibration_: ID statistics, after `fit`.

    Raises:
        ConfigError: settings that do not fit the network.
        TapError: taps that do not fit the network.
    """

    def __init__(self, net: nn.Module, settings: Settings | None = None, **changes: Any) -> None:
        super().__init__(net)
        self.settings = (settings or Settings()).replace(**changes)
        self.taps = resolve_taps(net, self.settings.taps)
        self.experts = (*self.taps, "output")
        self.strong = self._resolve_strong()
        self.calibration_: Calibration | None = None
        self._panel = self._panel_with(())
        self._thresholds: dict[float, float] = {}

    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Fit the ID statistics, preferably on ID images used neither for training nor for testing.

        The loader is read twice if ReAct needs a threshold.

        Raises:
            ZeroRangeError: an expert gives all ID images the same score.
            DataError, NonFiniteError, TapError: images or a network without usable scores.
        """
        if iter(loader) is loader:
            raise DataError(
                f"loader must be readable more than once, got a {type(loader).__name__}: "
                "fit on a DataLoader or a list of batches"
            )
        self.calibration_ = None
        self._thresholds = react_thresholds(self.net, loader, self._panel.percentiles, progress)
        id_scores = self._collect(loader, progress, "fit")[0][: len(self.experts)]
        self.calibration_ = calibrate(self.experts, id_scores, self._thresholds, self.settings)
        return self

    def with_calibration(self, calibration: Calibration) -> Self:
        """Use the ID statistics of an earlier fit on the same network instead of fitting."""
        if calibration.experts != self.experts:
            raise ConfigError(
                f"calibration must have the detector's experts {', '.join(self.experts)}, got "
                f"{', '.join(calibration.experts)}: fit again"
            )
        self._thresholds, self.calibration_ = calibration.react_thresholds, calibration
        return self

    def with_companions(self) -> Self:
        """Also score the output experts that need no extra forward pass, for comparison.

        They do not take part in the fusion; their scores follow those of the experts in
        `Scored.experts`, under the names in `companions`.
        """
        percentile = self.settings.react_percentile
        free = [
            Output(name, DEFAULT_TEMPERATURE[name], react_percentile=q)
            for q in dict.fromkeys((None, percentile))
            for name in ("msp", "mls", "energy")
        ]
        self.companions = tuple(
            o.output + "+react" * (o.react_percentile is not None) for o in free
        )
        self._panel = self._panel_with(free)
        return self

    def _panel_with(self, companions: Sequence[Output]) -> Panel:
        s = self.settings
        return Panel(self.taps, (s.feature_norm,), (s.output_expert, *companions))

    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._panel.scores(self.net, images, self._thresholds)

    def confidence(self, experts: NDArray[Any]) -> NDArray[np.float64]:
        z = normalise(experts[: len(self.experts)], self._check_fitted().statistics)
        strong = [self.experts.index(name) for name in self.strong]
        weak = [i for i in range(len(z)) if i not in strong]
        s = self.settings
        return fuse(z[strong], z[weak], s.weights, s.base, s.cap)

    def _check_fitted(self) -> Calibration:
        if self.calibration_ is None:
            raise NotFittedError("this FuseNorm has no ID statistics: call fit(loader) first")
        return self.calibration_

    def _resolve_strong(self) -> tuple[str, ...]:
        if isinstance(self.settings.strong, str):
            return first_of_last_stage(self.net, self.taps), "output"
        strong = []
        for expert in self.settings.strong:
            number = expert if isinstance(expert, int) else None
            if number is not None and not 0 <= number < len(self.taps):
                raise ConfigError(
                    f"strong expert {number} is out of range: there are {len(self.taps)} taps, "
                    f"numbered from 0: {', '.join(self.taps)}"
                )
            name = expert if isinstance(expert, str) else self.taps[expert]
            if name not in self.experts:
                raise ConfigError(
                    f"unknown strong expert {name!r}: the experts are {', '.join(self.experts)}"
                )
            strong.append(name)
        if len(set(strong)) != len(strong):
            raise ConfigError(f"strong must name each expert once, got {', '.join(strong)}")
        return tuple(strong)


def calibrate(
    experts: tuple[str, ...],
    id_scores: NDArray[np.float64],
    react_thresholds: dict[float, float],
    settings: Settings,
) -> Calibration:
    """ID statistics of expert scores `[L, N]` at the settings' percentiles."""
    low, high = settings.percentile_low, settings.percentile_high
    statistics = compute_id_statistics(id_scores, low, high, experts)
    return Calibration(experts, react_thresholds, id_scores, statistics)
