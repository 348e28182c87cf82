"""The settings of FuseNorm: what a user may choose, checked where it is chosen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.atf import FeatureNorm, check_atf_settings
from fusenorm_openood.method.experts import DEFAULT_TEMPERATURE, Output, check_output_expert
from fusenorm_openood.method.fusion import check_penalty, check_weights
from fusenorm_openood.method.statistics import check_percentiles


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the detector; the defaults are the published ones.

    Attributes:
        taps: ``"blocks"``, ``"stages"`` or module names; see :func:`resolve_taps`.
        k_min, k_max, alpha, eps: of the feature norm; see :func:`atf`.
        output: the output expert: ``msp``, ``mls``, ``energy`` or ``odin``.
        temperature: of the output expert; None = 1000 for ODIN, else 1.
        noise: ODIN's step on normalised pixels; 0 = no step and no gradient.
        input_std: divides ODIN's step channel by channel; None = not divided.
        react_percentile: percentile of the penultimate ID activations at which ReAct clips them
            for the output expert; None = no ReAct.
        strong: the strong experts, each a tap's name, a tap's number (from 0) or ``"output"``;
            ``"auto"`` = the first tap of the last stage and the output expert.
        weights: one weight a strong expert; None = equal.
        base, cap: of the penalty; see :func:`penalty`.
        percentile_low, percentile_high: percentiles of the ID scores that become 0 and 1.

    Raises:
        ConfigError: a value outside its range.
    """

    taps: str | tuple[str, ...] = "blocks"
    k_min: float = 0.1
    k_max: float = 0.25
    alpha: float = 0.0
    eps: float = 1e-8
    output: str = "odin"
    temperature: float | None = None
    noise: float = 0.01
    input_std: tuple[float, ...] | None = None
    react_percentile: float | None = 90.0
    strong: str | tuple[str | int, ...] = "auto"
    weights: tuple[float, ...] | None = None
    base: float = 20.0
    cap: float = 1.0
    percentile_low: float = 1.0
    percentile_high: float = 99.9

    def __post_init__(self) -> None:
        for name in ("taps", "input_std", "strong", "weights"):  # YAML gives lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            self._check_type(field.name, getattr(self, field.name))
        check_atf_settings(self.k_min, self.k_max, self.alpha, self.eps)
        check_output_expert(self.output)
        check_percentiles(self.percentile_low, self.percentile_high)
        check_penalty(self.base, self.cap)
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature} divides no logits: choose > 0")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise = {self.noise} is no length of a step: choose at least 0")
        if self.input_std is not None and not all(std > 0 for std in self.input_std):
            raise ConfigError(f"input_std = {self.input_std} divides by no deviation: choose > 0")
        if self.react_percentile is not None and not 0 < self.react_percentile < 100:
            raise ConfigError(
                f"react_percentile = {self.react_percentile} clips all or nothing: "
                "choose between 0 and 100, say 90, or none"
            )
        if isinstance(self.strong, str):
            if self.strong != "auto":
                raise ConfigError(f"strong = {self.strong!r} unknown: choose 'auto' or a list")
        elif not self.strong or len(set(self.strong)) != len(self.strong):
            raise ConfigError(f"strong = {list(self.strong)}: name one expert or more, each once")
        if self.weights is not None:
            check_weights(self.weights, 2 if isinstance(self.strong, str) else len(self.strong))

    def _check_type(self, name: str, value: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        optional = name in ("temperature", "input_std", "react_percentile", "weights")
        if name in ("input_std", "weights"):
            right = isinstance(value, tuple) and all(isinstance(v, int | float) for v in value)
        elif name in ("taps", "strong"):
            item = str if name == "taps" else str | int
            right = isinstance(value, str) or (
                isinstance(value, tuple) and all(isinstance(v, item) for v in value)
            )
        else:
            right = isinstance(value, str) if name == "output" else number
        if not (right or (optional and value is None)):
            raise ConfigError(
                f"{name} = {value!r} is of the wrong type: the default is "
                f"{getattr(type(self), name)!r}"
            )

    @property
    def feature_norm(self) -> FeatureNorm:
        """What decides the scores of the feature-norm experts."""
        return FeatureNorm(self.k_min, self.k_max, self.alpha, self.eps)

    @property
    def output_expert(self) -> Output:
        """What decides the score of the output expert; its own temperature where none is set."""
        default = DEFAULT_TEMPERATURE[self.output]
        temperature = default if self.temperature is None else self.temperature
        steps = self.output == "odin" and self.noise > 0
        noise, input_std = (self.noise, self.input_std) if steps else (0.0, None)
        return Output(self.output, temperature, noise, input_std, self.react_percentile)

    def replace(self, **changes: Any) -> "Settings":
        """A copy with some settings changed; ConfigError for a setting that does not exist."""
        check_names(changes)
        return replace(self, **changes)

    @classmethod
    def from_mapping(cls, args: Mapping[str, Any]) -> "Settings":
        """Settings from a configuration that names every one of them, and nothing else."""
        check_names(args)
        missing = [name for name in SETTINGS if name not in args]
        if missing:
            raise ConfigError(
                f"setting {missing[0]!r} is missing: the settings are {', '.join(SETTINGS)}"
            )
        return cls(**args)


SETTINGS = tuple(field.name for field in fields(Settings))
# Changing any other setting changes expert scores, and so asks for the network again.
FUSION_SETTINGS = frozenset(
    ("strong", "weights", "base", "cap", "percentile_low", "percentile_high")
)


def check_names(names: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is no setting."""
    for name in names:
        if name not in SETTINGS:
            raise ConfigError(f"setting {name!r} unknown: the settings are {', '.join(SETTINGS)}")
