"""The settings of FuseNorm, validated when they are created, and its three methods."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from fusenorm_openood.errors import ConfigError, number, numbers, unknown, whole
from fusenorm_openood.method import validation as rules
from fusenorm_openood.method.atf import FeatureNorm
from fusenorm_openood.method.scores import OUTPUTS, make_score
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.method.validation import Rule, among, checked


def _read_text(rule: Rule) -> Rule:
    """The rule of a number that a configuration may give as text: `1e-3`, `None`."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            with suppress(ValueError):
                return number(float(value))
        return rule.read(value)

    return replace(rule, read=read)


def _list_of(*kinds: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reader of a string, or a list of strings and of what other kinds can read."""

    def read(values: Any) -> Any:
        if isinstance(values, str):
            return values
        if not isinstance(values, tuple | list):
            return None
        items = tuple(
            v if isinstance(v, str) else next((f for k in kinds if (f := k(v)) is not None), None)
            for v in values
        )
        return None if None in items else items

    return read


NAMES = Rule("'blocks', 'stages' or a list of names", _list_of())
EXPERTS = Rule(
    "'auto' or a list of at least one expert, by name or number, each once",
    _list_of(whole),
    lambda v: v == "auto" or (isinstance(v, tuple) and 0 < len(v) == len(set(v))),
)
WEIGHTS = Rule("a list of numbers", numbers, optional=True)
DEVIATIONS = Rule("a list of numbers > 0", numbers, lambda v: min(v, default=1) > 0, optional=True)


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
        strong: strong experts, each a layer's name, its number (from 0), `"output"` or the output
            expert's name, or one of `knn`, `fdbd`, `gen`, `logitgap`, `nci`, `mds`, `mds++`,
            `rmds`, `rmds++`, `mahavar`, `head_mds`, `vim`, `she`, `scale`, `ash`, `ras`;
            `"auto"` = the first layer of the last stage and the output expert. The other layers
            are weak.
        weights: one weight per strong expert; None = equal weights.
        trust: whether the weights are multiplied by what the ID images tell of each expert's fit;
            see `method.statistics.trust`.
        normalisation: of strong experts: `"standardised"`, by mean and standard deviation of the ID
            scores, or `"percentiles"`. Weak ones are normalised by percentiles.
        clip: whether a strong score above the percentile `percentile_high` of the ID scores
            counts as that percentile; with the penalty `"deviation"`, it also removes the cap for
            images that are far off.
        penalty: `"joint"`, from the joint distance of the norms of all layers (see
            `JointDistance`), or `"deviation"`, from the largest deviation of a weak expert (see
            `penalty`).
        base: how steeply the penalty `"deviation"` grows.
        cap: largest penalty of images that are not far off; see `JointDistance`.
        joint_margin: how many standard deviations above the mean of the ID images the log joint
            distance is at which the penalty `"joint"` is 1.
        percentile_low: percentile of the ID scores that is mapped to 0.
        percentile_high: percentile of the ID scores that is mapped to 1.
        random: what happens if two passes over the same images give other logits: `"refuse"`, an
            error, or `"allow"`, a warning.

    Raises:
        ConfigError: a value outside its range.

    Examples:
        >>> settings = Settings(strong=["energy", "knn"])
        >>> settings.replace(neighbours=20).neighbours
        20
    """

    taps: str | tuple[str, ...] = checked("blocks", NAMES)
    k_min: float = checked(0.1, _read_text(rules.FRACTION))
    k_max: float = checked(0.25, _read_text(rules.FRACTION))
    alpha: float = checked(0.0, _read_text(rules.UNIT))
    eps: float = checked(1e-8, _read_text(rules.POSITIVE))
    output: str = checked("energy", among(*OUTPUTS))
    temperature: float | None = checked(None, _read_text(rules.POSITIVE.or_none()))
    noise: float = checked(0.01, _read_text(rules.NOT_NEGATIVE))
    input_std: tuple[float, ...] | None = checked(None, DEVIATIONS)
    react_percentile: float | None = checked(None, _read_text(rules.PERCENTILE.or_none()))
    neighbours: int = checked(5, rules.COUNT)
    strong: str | tuple[str | int, ...] = checked(
        ("output", "logitgap", "fdbd", "head_mds"), EXPERTS
    )
    weights: tuple[float, ...] | None = checked(None, WEIGHTS)
    trust: bool = checked(True, rules.SWITCH)
    normalisation: str = checked("standardised", among("standardised", "percentiles"))
    clip: bool = checked(True, rules.SWITCH)
    penalty: str = checked("joint", among("joint", "deviation"))
    base: float = checked(2.0, _read_text(rules.BASE))
    cap: float = checked(10.0, _read_text(rules.NOT_NEGATIVE))
    joint_margin: float = checked(3.0, _read_text(rules.FINITE))
    percentile_low: float = checked(5.0, _read_text(rules.WITHIN_100))
    percentile_high: float = checked(95.0, _read_text(rules.WITHIN_100))
    random: str = checked("refuse", among("refuse", "allow"))

    @classmethod
    def published(cls, **changes: Any) -> "Settings":
        """Settings of the method `fusenorm_published`: those of the published experiments."""
        published = cls.deviation(
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
    def deviation(cls, **changes: Any) -> "Settings":
        """Settings of the method `fusenorm_deviation`: normalisation and penalty as published.

        The strong experts and constants are those of the default before 0.3.0.
        """
        before = cls(
            strong=("output", "fdbd", "mds++"),
            trust=False,
            normalisation="percentiles",
            penalty="deviation",
            cap=1.0,
        )
        return before.replace(**changes)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["rule"].optional and isinstance(value, str) and value.lower() == "none":
                object.__setattr__(self, f.name, None)
        rules.check_fields(self)
        rules.check_order("k_min", self.k_min, "k_max", self.k_max)
        rules.check_percentiles(self.percentile_low, self.percentile_high)
        if self.weights is not None:
            count = 2 if isinstance(self.strong, str) else len(self.strong)
            rules.scaled_weights(self.weights, count)

    @property
    def feature_norm(self) -> FeatureNorm:
        """The settings that determine the scores of the feature-norm experts."""
        return FeatureNorm(self.k_min, self.k_max, self.alpha, self.eps)

    def score(self, expert: str) -> Score:
        """The score of a strong expert that is no layer: `"output"`, or a name of `POSTHOC`."""
        if expert == "knn":
            return make_score("knn", {"K": self.neighbours})
        if expert != "output":
            return make_score(expert)
        kind, more = OUTPUTS[self.output], dict[str, Any]()
        if self.output == "odin":
            more = {"noise": self.noise, "input_std": self.input_std if self.noise else None}
        if self.temperature is not None:
            more["temperature"] = self.temperature
        return kind(react_percentile=self.react_percentile, fused=True, **more)

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

        What files and configurations of 0.2.0 lack may be absent: see `BEFORE`.
        """
        check_names(args)
        args = {**BEFORE, **args}
        missing = [name for name in SETTINGS if name not in args]
        if missing:
            raise ConfigError(
                f"setting {missing[0]!r} is missing: the settings are {', '.join(SETTINGS)}"
            )
        return cls(**args)


# The methods by the names under which their results are reported.
METHODS: dict[str, Callable[[], Settings]] = {
    "fusenorm": Settings,
    "fusenorm_published": Settings.published,
    "fusenorm_deviation": Settings.deviation,
}
SETTINGS = tuple(field.name for field in fields(Settings))
# What 0.2.0 did, which did not have these settings.
BEFORE = {"trust": False, "normalisation": "percentiles", "random": "refuse"}
# Changing any other setting changes the expert scores, and so needs the network again.
FUSION_SETTINGS = frozenset(
    {"strong", "weights", "trust", "normalisation", "clip", "penalty", "base", "cap"}
    | {"joint_margin", "random", "percentile_low", "percentile_high"}
)


def check_names(names: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is not a setting."""
    for name in names:
        if name not in SETTINGS:
            raise ConfigError(unknown("setting", name, SETTINGS))
