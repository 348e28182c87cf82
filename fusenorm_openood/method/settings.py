"""The settings of FuseNorm, validated when they are created, and its three methods."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from fusenorm_openood.errors import ConfigError, number, numbers, whole
from fusenorm_openood.method.atf import FeatureNorm, checked_atf_settings
from fusenorm_openood.method.experts import DEFAULT_TEMPERATURE, Output, check_output_expert
from fusenorm_openood.method.fusion import check_penalty, check_weights
from fusenorm_openood.method.posthoc import Posthoc
from fusenorm_openood.method.statistics import check_percentiles

PENALTIES = ("deviation", "joint")
RANDOM = ("refuse", "allow")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the detector; the defaults are those of the method `fusenorm`.

    Attributes:
        taps: `"blocks"`, `"stages"` or module names; see `resolve_taps`.
        k_min: smallest fraction of pixels to average; see `atf`.
        k_max: largest fraction of pixels to average; see `atf`.
        alpha: share of the uniform weight in each channel weight; see `atf`.
        eps: keeps divisions and logarithms finite; see `atf`.
        output: output expert: `msp`, `mls`, `energy` or `odin`.
        temperature: temperature of the output expert; None = 1000 for ODIN, 1 otherwise.
        noise: ODIN's step size on normalised pixels; 0 = no step and no gradient.
        input_std: standard deviations that divide ODIN's step per channel; None = no division.
        react_percentile: percentile of the penultimate ID activations at which ReAct clips them
            for the output expert; None = no ReAct.
        neighbours: number K of the nearest ID images for `knn`.
        strong: strong experts, each a tap's name, a tap's number (from 0), `"output"` or the
            output expert's name, or one of `knn`, `fdbd`, `gen`, `nci`, `mds`, `vim`, `she`,
            `scale`, `ash`; `"auto"` = the first tap of the last stage and the output expert. The
            other taps are weak.
        weights: one weight per strong expert; None = equal weights.
        clip: whether a strong score above the percentile `percentile_high` of the ID scores
            counts as that percentile, and images that are far off are penalised beyond `cap`.
        penalty: `"deviation"`, from the largest deviation of a weak expert (see `penalty`), or
            `"joint"`, from the joint distance of the norms of all taps (see `joint_penalty`).
        base: how steeply the penalty `"deviation"` grows.
        cap: largest penalty of `"deviation"`, of images that are not far off.
        joint_weight: weight of the penalty `"joint"`.
        percentile_low: percentile of the ID scores that is mapped to 0.
        percentile_high: percentile of the ID scores that is mapped to 1.
        random: what happens if two passes over the same images give other logits: `"refuse"`, an
            error, or `"allow"`, a warning.

    Raises:
        ConfigError: a value outside its range.
    """

    taps: str | tuple[str, ...] = "blocks"
    k_min: float = 0.1
    k_max: float = 0.25
    alpha: float = 0.0
    eps: float = 1e-8
    output: str = "energy"
    temperature: float | None = None
    noise: float = 0.01
    input_std: tuple[float, ...] | None = None
    react_percentile: float | None = None
    neighbours: int = 5
    strong: str | tuple[str | int, ...] = ("output", "fdbd", "mds")
    weights: tuple[float, ...] | None = None
    clip: bool = True
    penalty: str = "deviation"
    base: float = 2.0
    cap: float = 1.0
    joint_weight: float = 0.25
    percentile_low: float = 5.0
    percentile_high: float = 95.0
    random: str = "refuse"

    @classmethod
    def published(cls, **changes: Any) -> "Settings":
        """Settings of the method `fusenorm_published`: those of the published experiments."""
        published = cls(
            output="odin",
            react_percentile=90.0,
            strong="auto",
            clip=False,
            base=20.0,
            percentile_low=1.0,
            percentile_high=99.9,
        )
        return published.replace(**changes)

    @classmethod
    def joint(cls, **changes: Any) -> "Settings":
        """Settings of the method `fusenorm_joint`: the default with the joint penalty."""
        return cls(penalty="joint").replace(**changes)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = self._checked(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
        checked_atf_settings(self.k_min, self.k_max, self.alpha, self.eps)
        check_output_expert(self.output)
        check_percentiles(self.percentile_low, self.percentile_high)
        check_penalty(self.base, self.cap)
        if self.penalty not in PENALTIES:
            raise ConfigError(
                f"unknown penalty {self.penalty!r}: choose from {', '.join(PENALTIES)}"
            )
        if self.random not in RANDOM:
            raise ConfigError(f"unknown random {self.random!r}: choose from {', '.join(RANDOM)}")
        if not self.joint_weight >= 0:
            raise ConfigError(f"joint_weight must be >= 0, got {self.joint_weight}")
        if self.neighbours < 1:
            raise ConfigError(f"neighbours must be >= 1, got {self.neighbours}")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature must be > 0, got {self.temperature}")
        if not self.noise >= 0:
            raise ConfigError(f"noise must be >= 0, got {self.noise}")
        if self.input_std is not None and not all(std > 0 for std in self.input_std):
            raise ConfigError(f"input_std must be > 0 in every channel, got {self.input_std}")
        if self.react_percentile is not None and not 0 < self.react_percentile < 100:
            raise ConfigError(
                "react_percentile must be > 0 and < 100, for example 90, or None, got "
                f"{self.react_percentile}"
            )
        if isinstance(self.strong, str):
            if self.strong != "auto":
                raise ConfigError(
                    f"strong must be 'auto' or a list of experts, got {self.strong!r}"
                )
        elif not self.strong or len(set(self.strong)) != len(self.strong):
            raise ConfigError(
                f"strong must name at least one expert, each once, got {list(self.strong)}"
            )
        if self.weights is not None:
            check_weights(self.weights, 2 if isinstance(self.strong, str) else len(self.strong))

    def _checked(self, name: str, value: Any, kind: Any) -> Any:
        """The value of a setting, with Python's own numbers; ConfigError for another type."""
        if isinstance(value, str):
            value = _from_text(value, kind)
        optional = name in ("temperature", "input_std", "react_percentile", "weights")
        if optional and value is None:
            return None
        found: Any
        if name in ("input_std", "weights"):
            wanted, found = "a list of numbers", numbers(value)
        elif name in ("taps", "strong"):
            wanted = f"a string or a list of {'names' if name == 'taps' else 'names and numbers'}"
            found = value if isinstance(value, str) else None
            if isinstance(value, tuple | list):  # YAML gives lists
                number_of = whole if name == "strong" else lambda v: None
                items = tuple(v if isinstance(v, str) else number_of(v) for v in value)
                found = None if None in items else items
        elif name in ("output", "penalty", "random"):
            wanted, found = "a string", value if isinstance(value, str) else None
        elif name == "clip":
            wanted, found = "true or false", value if isinstance(value, bool) else None
        elif name == "neighbours":
            wanted, found = "a whole number", whole(value)
        else:
            wanted, found = "a finite number", number(value)
        if found is None:
            raise ConfigError(f"{name} must be {wanted}{' or None' * optional}, got {value!r}")
        return found

    def posthoc(self, name: str) -> Posthoc:
        """A post-hoc expert with its default arguments, but for the neighbours of `knn`."""
        return Posthoc.of(name, {"K": self.neighbours} if name == "knn" else {})

    @property
    def feature_norm(self) -> FeatureNorm:
        """The settings that determine the scores of the feature-norm experts."""
        return FeatureNorm(self.k_min, self.k_max, self.alpha, self.eps)

    @property
    def output_expert(self) -> Output:
        """The settings that determine the output expert's score, with its default temperature."""
        default = DEFAULT_TEMPERATURE[self.output]
        temperature = default if self.temperature is None else self.temperature
        steps = self.output == "odin" and self.noise > 0
        noise, input_std = (self.noise, self.input_std) if steps else (0.0, None)
        return Output(self.output, temperature, noise, input_std, self.react_percentile)

    def to_json(self) -> dict[str, Any]:
        """The settings in terms of JSON, without `random` where it has its default."""
        return {n: v for n, v in vars(self).items() if (n, v) != ("random", "refuse")}

    def replace(self, **changes: Any) -> "Settings":
        """A copy with some settings changed; ConfigError for an unknown setting."""
        check_names(changes)
        return replace(self, **changes)

    @classmethod
    def from_mapping(cls, args: Mapping[str, Any]) -> "Settings":
        """Settings from a configuration that gives every setting, and nothing else.

        `random` may be absent: files and configurations of 0.2.0 lack it.
        """
        check_names(args)
        missing = [name for name in SETTINGS if name not in args and name != "random"]
        if missing:
            raise ConfigError(
                f"setting {missing[0]!r} is missing: the settings are {', '.join(SETTINGS)}"
            )
        return cls(**args)


# The methods by the names under which their results are reported.
METHODS: dict[str, Callable[[], Settings]] = {
    "fusenorm": Settings,
    "fusenorm_published": Settings.published,
    "fusenorm_joint": Settings.joint,
}
SETTINGS = tuple(field.name for field in fields(Settings))
# Changing any other setting changes the expert scores, and so needs the network again.
FUSION_SETTINGS = frozenset(
    (
        "strong",
        "weights",
        "clip",
        "penalty",
        "base",
        "cap",
        "joint_weight",
        "percentile_low",
        "percentile_high",
        "random",
    )
)


def _from_text(text: str, kind: Any) -> Any:
    """The value of a setting of this type that a configuration gives as text: `None`, `1e-3`."""
    if type(None) in get_args(kind) and text.lower() == "none":
        return None
    if kind in (float, float | None):
        with suppress(ValueError):
            return float(text)
    return text


def check_names(names: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is not a setting."""
    for name in names:
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}: the settings are {', '.join(SETTINGS)}")
