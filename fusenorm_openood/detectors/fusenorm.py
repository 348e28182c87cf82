"""The FuseNorm detector, for any torch network; it does not need OpenOOD."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.base import Detector, fit_panel
from fusenorm_openood.errors import ConfigError, NotFittedError
from fusenorm_openood.listening.panel import Fitted, Panel
from fusenorm_openood.listening.taps import first_of_last_stage, resolve_taps
from fusenorm_openood.method.experts import DEFAULT_TEMPERATURE, OUTPUT_EXPERTS, Output
from fusenorm_openood.method.fusion import fuse, mean_of_strong
from fusenorm_openood.method.joint import JointStatistics, joint_penalty, joint_statistics
from fusenorm_openood.method.posthoc import POSTHOC, Posthoc
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.statistics import (
    IDStatistics,
    compute_id_statistics,
    normalise,
    standardise,
)


@dataclass(frozen=True)
class Calibration:
    """What `FuseNorm.fit` learns; it can be pickled without the network.

    Attributes:
        experts: names of the experts.
        fitted: what the experts themselves have fitted.
        id_scores: their scores on ID images `[L, N]`.
        statistics: ID statistics of the experts, or with the joint penalty of the strong ones.
        joint: statistics of the joint distance, with the joint penalty.
    """

    experts: tuple[str, ...]
    fitted: Fitted
    id_scores: NDArray[np.float64]
    statistics: IDStatistics
    joint: JointStatistics | None = None


class FuseNorm(Detector):
    """OOD detector that fuses the feature norms of all residual blocks with strong experts.

    Args:
        net: any network that returns logits `[B, K]`; it is left unchanged.
        settings: all settings at once, for example `Settings.published()` or `Settings.joint()`;
            None = the default method, `fusenorm`.
        changes: individual settings by name; see `Settings`.

    Attributes:
        experts: names of the experts: the taps in order, and the strong experts that are no taps.
        strong: names of the strong experts; the other taps are weak.
        calibration_: ID statistics, after `fit`.

    Raises:
        ConfigError: settings that do not fit the network.
        TapError: taps that do not fit the network.
    """

    def __init__(self, net: nn.Module, settings: Settings | None = None, **changes: Any) -> None:
        super().__init__(net)
        self.settings = (settings or Settings()).replace(**changes)
        self.taps = resolve_taps(net, self.settings.taps)
        self.strong = self._resolve_strong()
        others = [name for name in ("output", *POSTHOC) if name in self.strong]
        self.experts = (*self.taps, *others)
        self.calibration_: Calibration | None = None
        self.panel = self._panel_with(())
        self._fitted = Fitted()

    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Fit the ID statistics, preferably on ID images used neither for training nor for testing.

        The loader is read once, and once more if ReAct needs a threshold. If a strong expert keeps
        features, as `knn` does, an even sample of at most 10,000 images is used.

        Raises:
            ZeroRangeError: an expert gives all ID images the same score.
            DataError, NonFiniteError, TapError: images or a network without usable scores.
        """
        self.calibration_ = None
        self._fitted, scores, *_ = fit_panel(self, self.panel, loader, progress, "fit")
        self.calibration_ = self.calibrate(scores[self._rows()], self._fitted)
        return self

    def calibrate(self, id_scores: NDArray[np.float64], fitted: Fitted) -> Calibration:
        """The calibration from scores `[L, N]` of the experts on ID images; it is not kept.

        Raises:
            ZeroRangeError, NonFiniteError: as in `fit`.
        """
        low, high = self.settings.percentile_low, self.settings.percentile_high
        if self.settings.penalty == "joint":
            rows = [self.experts.index(name) for name in self.strong]
            statistics = compute_id_statistics(id_scores[rows], low, high, self.strong)
            joint = joint_statistics(id_scores[: len(self.taps)], self.taps)
            return Calibration(self.experts, fitted, id_scores, statistics, joint)
        statistics = compute_id_statistics(id_scores, low, high, self.experts)
        return Calibration(self.experts, fitted, id_scores, statistics)

    def with_calibration(self, calibration: Calibration) -> Self:
        """Use the ID statistics of an earlier fit on the same network instead of fitting."""
        if calibration.experts != self.experts:
            raise ConfigError(
                f"calibration must have the detector's experts {', '.join(self.experts)}, got "
                f"{', '.join(calibration.experts)}: fit again"
            )
        self._fitted, self.calibration_ = calibration.fitted, calibration
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
        self.companions, self._free = tuple(output.label for output in free), free
        self.panel = self._panel_with(free)
        return self

    @property
    def _output(self) -> tuple[Output, ...]:
        return (self.settings.output_expert,) if "output" in self.strong else ()

    @property
    def _posthoc(self) -> tuple[Posthoc, ...]:
        return tuple(self.settings.posthoc(n) for n in self.experts if n in POSTHOC)

    def _panel_with(self, companions: Sequence[Output]) -> Panel:
        outputs = tuple(dict.fromkeys((*self._output, *companions)))
        return Panel(self.taps, (self.settings.feature_norm,), outputs, self._posthoc)

    def _rows(self) -> list[int]:
        """The panel's rows of the experts, in order."""
        return self.rows_in(self.panel)

    def rows_in(self, panel: Panel) -> list[int]:
        """The rows of the experts, in order, among the scores of a panel that has them all."""
        return [
            *panel.norm_rows(self.taps, self.settings.feature_norm),
            *(panel.output_row(output) for output in self._output),
            *(panel.posthoc_row(expert) for expert in self._posthoc),
        ]

    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, pred = self.panel.scores(self.net, images, self._fitted)
        if not self.companions:
            return scores, pred
        return scores[[*self._rows(), *map(self.panel.output_row, self._free)]], pred

    def confidence(self, experts: NDArray[Any]) -> NDArray[np.float64]:
        calibration, s = self._check_fitted(), self.settings
        strong = [self.experts.index(name) for name in self.strong]
        weak = [i for i, tap in enumerate(self.taps) if tap not in self.strong]
        if calibration.joint is not None:
            z = standardise(experts[strong], calibration.statistics, s.clip)
            penalty = joint_penalty(experts[: len(self.taps)], calibration.joint)
            return mean_of_strong(z, s.weights) - s.joint_weight * penalty
        z = normalise(experts[: len(self.experts)], calibration.statistics)
        clipped = np.minimum(z[strong], 1) if s.clip else z[strong]
        return fuse(clipped, z[weak], s.weights, s.base, s.cap)

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
            name = "output" if name == self.settings.output else name
            if name not in (*self.taps, "output", *POSTHOC):
                way_out = f"choose from {', '.join((*self.taps, 'output', *POSTHOC))}"
                way_out = f"set output={name!r}" if name in OUTPUT_EXPERTS else way_out
                raise ConfigError(
                    f"unknown strong expert {name!r} with output={self.settings.output!r}: "
                    f"{way_out}"
                )
            strong.append(name)
        if len(set(strong)) != len(strong):
            raise ConfigError(f"strong must name each expert once, got {', '.join(strong)}")
        return tuple(strong)
