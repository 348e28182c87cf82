"""What a detector finds on ID images, and what its confidences are made of."""

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.forward.experts import Fitted
from fusenorm_openood.forward.taps import NO_LAYERS
from fusenorm_openood.method.fusion import Fusion
from fusenorm_openood.method.joint import JointStatistics, joint_statistics, sum_of_rows
from fusenorm_openood.method.scores import make_score
from fusenorm_openood.method.scores.base import Score, State
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.statistics import IDStatistics, compute_id_statistics
from fusenorm_openood.method.validation import scaled_weights
from fusenorm_openood.network.fingerprint import Fingerprint


@dataclass(frozen=True)
class Explanation:
    """What the confidences of `B` images are made of.

    Attributes:
        experts: names of the experts.
        conf: confidences `[B]`, larger = more in-distribution.
        pred: predicted classes `[B]`.
        scores: scores `[L, B]` of the experts, larger = more in-distribution.
        normalised: normalised scores `[L, B]`: in standard deviations from the mean of the ID
            images, those of blocks by their logarithms; or by percentiles, if the settings say so.
        weights: weights of the strong experts, which sum to 1.
        contributions: contributions `[L, B]` of the experts to the confidences, their sums.
        below_mean: by how much each contribution `[L, B]` is below its mean over the ID images.
        objected: the expert whose contribution is farthest below its mean, for each image.
        maps: by layer, heat maps `[B, H, W]` that add up to its norms; see `atf_map`.
        p_values: conformal p-values `[B]`, None without calibration images.
    """

    experts: tuple[str, ...]
    conf: NDArray[np.float64]
    pred: NDArray[np.int64]
    scores: NDArray[np.float64]
    normalised: NDArray[np.float64]
    contributions: NDArray[np.float64]
    below_mean: NDArray[np.float64]
    objected: tuple[str, ...]
    maps: dict[str, Tensor]
    weights: dict[str, float]
    p_values: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class DetectorStatistics:
    """The ID statistics of a FuseNorm, found from its ID scores; to be pickled without the network.

    ZeroRangeError if an expert gives all ID images the same score, NonFiniteError for other scores.
    """

    experts: tuple[str, ...]  # the layers, then others
    fitted: Fitted  # what the experts themselves have fitted
    id_scores: NDArray[np.float64]  # their scores on ID images `[L, N]`
    settings: Settings
    strong: tuple[str, ...]
    network: Fingerprint | None = None  # what that of the fit is recognised by, if it is known
    largest_logit: float = 0.0  # the size of its logits, if that is known
    # Of all experts, or with the joint penalty of the strong ones.
    statistics: IDStatistics = field(init=False)
    joint: JointStatistics | None = field(init=False)  # with the joint penalty or the clip

    def __post_init__(self) -> None:
        s, layers, joint = self.settings, self.layers, None
        names = self.strong if s.penalty == "joint" else self.experts
        rows = [self.experts.index(name) for name in names]
        output: Any = s.score("output")
        divided = output.temperature if output.output in ("msp", "odin") else 1.0
        scale = [self.largest_logit / divided if name == "output" else 0.0 for name in names]
        low, high = s.percentile_low, s.percentile_high
        found = compute_id_statistics(self.id_scores[rows], low, high, names, scale, s.clip)
        if s.penalty == "joint" or s.clip:
            joint = joint_statistics(self.id_scores[: len(layers)], layers)
        object.__setattr__(self, "statistics", found)
        object.__setattr__(self, "joint", joint)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the tapped layers."""
        return tuple(name for name in self.experts if name not in NO_LAYERS)

    @cached_property
    def fusion(self) -> Fusion:
        """The fusion of scores into contributions."""
        strong, weights = map(self.experts.index, self.strong), list(self.weights.values())
        size = len(self.layers), len(self.experts)
        return Fusion(self.settings, [*strong], weights, *size, self.statistics, self.joint)

    @property
    def trust(self) -> dict[str, float]:
        """How far the fit of each strong expert can be trusted, in [0, 1]; 1 if nothing is fitted.

        It is 1 for all if the setting `trust` is off.
        """
        found = {score.name: trust for score, trust in self.fitted.trust.items()}
        return {name: found.get(name, 1.0) if self.settings.trust else 1.0 for name in self.strong}

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the strong experts, which sum to 1: those of the settings times the trust.

        Without the trust if it leaves none.
        """
        given = scaled_weights(self.settings.weights, len(self.strong))
        trusted = [w * trust for w, trust in zip(given, self.trust.values(), strict=True)]
        weights = scaled_weights(trusted, len(trusted)) if any(trusted) else given
        return dict(zip(self.strong, weights, strict=True))

    @property
    def weighted(self) -> list[str]:
        """The strong experts, with their weights if these differ."""
        shown = {name: f"{weight:.2f}" for name, weight in self.weights.items()}
        if len({*shown.values()}) == 1:
            return list(self.strong)
        return [f"{name} {weight}" for name, weight in shown.items()]

    def contributions(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Contributions `[L, N]` of the experts to the confidences, which are their sums."""
        found: NDArray[np.float64] = self.fusion(_float64(scores)).numpy()
        return found

    def confidence(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Confidences `[N]` of images with these scores `[L, N]`, the sums of the contributions."""
        return sum_of_rows(self.fusion(_float64(scores))).numpy()

    def normalised(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Normalised scores `[L, N]`; see `Fusion.normalised`."""
        return self.fusion.normalised(_float64(scores)).numpy()

    @cached_property
    def mean_contributions(self) -> NDArray[np.float64]:
        """Mean contributions `[L, 1]` over the ID images."""
        mean: NDArray[np.float64] = self.contributions(self.id_scores).mean(axis=1, keepdims=True)
        return mean

    def explanation(
        self, scores: NDArray[np.float64], pred: NDArray[np.int64], maps: dict[str, Tensor]
    ) -> Explanation:
        """That of images with these scores `[L, B]`, predicted classes `[B]` and heat maps."""
        contributions = self.contributions(scores)
        below = self.mean_contributions - contributions
        return Explanation(
            self.experts,
            self.confidence(scores),
            pred,
            scores,
            self.normalised(scores),
            contributions,
            below,
            tuple(self.experts[row] for row in below.argmax(axis=0)),
            maps,
            self.weights,
        )

    def joint_distance(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """The log joint distances `[N]` of images with these scores, with the joint penalty."""
        distance = self.fusion.joint_distance
        terms = distance.terms(_float64(scores[: len(self.layers)]))
        return distance.log_distance(terms).numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def packed(statistics: DetectorStatistics) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ID statistics, and the rest of them in terms of JSON."""
    s = statistics
    tensors = {"id_scores": torch.from_numpy(s.id_scores)}
    for number, state in enumerate(s.fitted.states.values()):
        tensors |= {f"state.{number}.{name}": value.cpu() for name, value in state.items()}
    return tensors, {
        "settings": s.settings.to_json(),
        "experts": s.experts,
        "strong": s.strong,
        "thresholds": list(s.fitted.thresholds.items()),
        "posthoc": [score.to_json() for score in s.fitted.states],
        "trust": [s.fitted.trust.get(score, 1.0) for score in s.fitted.states],
    }


def unpacked(tensors: dict[str, Tensor], record: dict[str, Any]) -> DetectorStatistics:
    """The ID statistics that were `packed`, from parts that are known to be right."""
    states = dict[Score, State]()
    for number, (name, arguments) in enumerate(record["posthoc"]):
        of = f"state.{number}."
        found = {n.removeprefix(of): t for n, t in tensors.items() if n.startswith(of)}
        states[make_score(name, arguments)] = found
    trust = dict(zip(states, record["trust"], strict=True))
    with warnings.catch_warnings():  # of constant layers, as in the fit
        warnings.simplefilter("ignore")
        return DetectorStatistics(
            tuple(record["experts"]),
            Fitted(dict(map(tuple, record["thresholds"])), states, trust),
            tensors["id_scores"].numpy(),
            Settings.from_mapping(record["settings"]),
            tuple(record["strong"]),
            record["network"],
        )


def _float64(scores: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float64))
