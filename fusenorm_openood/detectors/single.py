"""Single scores as detectors, with OpenOOD's names, arguments and conventions."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fitting import (
    fit_experts,
    react_thresholds,
    try_experts,
    warn_if_few,
)
from fusenorm_openood.detectors.scorer import atomic
from fusenorm_openood.errors import CheckpointError, NotFittedError
from fusenorm_openood.forward.experts import Experts, Fitted
from fusenorm_openood.method.scores import LOGIT_SCORES, make_score
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.network.running import scoring_module, unwrapped


class SingleScore(Detector):
    """One score, computed as in OpenOOD, including ties.

    It is fitted on all images that it is given, in bounded memory: KNN's neighbours and the scale
    of ViM's virtual logit are those of all images if their features and logits take at most 1 GiB,
    else those of an even sample.

    Args:
        net: any network; a T2FNorm network is scored by its scoring logits.
        score: a score, or the name of one; see `fusenorm_openood.method.scores`.
        random: whether the network may be random, `refuse` or `allow`; see `Settings`.
        arguments: the score's arguments by OpenOOD's names; the others have their defaults.

    Raises:
        ConfigError: an unknown score, or invalid arguments.
        CheckpointError: `t2fnorm` with a network that was not trained with T2FNorm.

    >>> from torchvision.models import resnet18
    >>> SingleScore(resnet18(num_classes=4), "knn", K=3)
    SingleScore(ResNet, KNN(K=3, root=False); not fitted)
    """

    def __init__(
        self, net: nn.Module, score: str | Score, random: str = "refuse", **arguments: Any
    ) -> None:
        super().__init__(net, None, random)
        chosen = make_score(score, arguments) if isinstance(score, str) else score
        if chosen.needs_t2fnorm and scoring_module(net) is None:
            raise CheckpointError(
                f"postprocessor {chosen.name!r} needs a network trained with T2FNorm, got a "
                f"{type(unwrapped(net)).__name__}: use such a checkpoint, or another postprocessor"
            )
        self._score, self.rows = chosen, [chosen]
        self.experts, self.all_experts = (chosen.name,), Experts(scores=(chosen,))
        self.fitted_on = "val" if chosen.name in LOGIT_SCORES else "train"

    def __repr__(self) -> str:
        state = f"fitted, {self._calibrated}" if self.is_fitted else "not fitted"
        return f"SingleScore({type(unwrapped(self.net)).__name__}, {self._score}; {state})"

    @atomic
    def fit(self, loader: Iterable[Any], progress: bool = False) -> "SingleScore":
        """Fit the score on ID images, as OpenOOD does; some scores have nothing to fit.

        Raises:
            NonFiniteError: a feature is not finite.
            DataError: the loader gives no images, or labels that are no class of the network.
        """
        if self._score.needs_fit or self._score.clip_percentile is not None:
            readings, images = self._begin(loader)
            scoring = self.scoring()
            if images is not None:
                try_experts(scoring, images)
            if self._score.needs_fit:
                self.fitted, _ = fit_experts(scoring, readings, progress, by_label=True)
            else:
                warn_if_few(scoring, readings)
                self.fitted = Fitted(react_thresholds(scoring, readings, progress))
        return self

    @property
    def threshold_(self) -> float | None:
        """ReAct's clipping threshold, None before `fit`."""
        return next(iter(self.fitted.thresholds.values()), None)

    def check_fitted(self) -> None:
        unfitted = self._score.needs_fit and self._score not in self.fitted.states
        if unfitted or (self._score.clip_percentile is not None and self.threshold_ is None):
            raise NotFittedError(f"this {self._score.name} is not fitted: call fit(loader) first")

    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        """The scores `[N]` in float32, unless they were computed in float64."""
        conf: NDArray[Any] = experts[0]
        with np.errstate(over="ignore"):
            narrow: NDArray[Any] = conf.astype(np.float32)
        return narrow if np.array_equal(narrow, conf) else conf
