"""Rules that settings and arguments must satisfy: one table, checked when they are made."""

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fusenorm_openood.errors import ConfigError, number, numbers, whole


@dataclass(frozen=True)
class Rule:
    """What a value must be."""

    text: str  # in words, after "must be"
    read: Callable[[Any], Any]  # the value as Python's own type; None for one of another type
    holds: Callable[[Any], bool] = lambda value: True  # whether the value is in its range
    optional: bool = False  # whether None is a value, too

    def __call__(self, name: str, value: Any) -> Any:
        """The value of `name`; ConfigError if it breaks the rule."""
        if self.optional and value is None:
            return None
        found = self.read(value)
        if found is None or not self.holds(found):
            text = f"{self.text} or None" if self.optional else self.text
            raise ConfigError(f"{name} must be {text}, got {value!r}")
        return found

    def or_none(self) -> "Rule":
        """The rule for a value that may be None."""
        return replace(self, optional=True)


def among(*values: str) -> Rule:
    """One of some strings."""
    text = f"one of {', '.join(values)}"
    return Rule(text, lambda v: v if isinstance(v, str) else None, lambda v: v in values)


def scaled_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights of `count` strong experts, scaled to sum to 1; None = equal weights.

    ConfigError unless they are one number >= 0 for each, not all 0.
    """
    given = (1.0,) * count if weights is None else numbers(weights)
    if given is None or len(given) != count or min(given) < 0 or not 0 < sum(given) < math.inf:
        raise ConfigError(
            f"weights must be one number >= 0 for each of the {count} strong experts, not all 0, "
            f"got {weights}"
        )
    return [weight / sum(given) for weight in given]


FINITE = Rule("a finite number", number)
POSITIVE = Rule("a number > 0", number, lambda v: v > 0)
NOT_NEGATIVE = Rule("a number >= 0", number, lambda v: v >= 0)
COUNT = Rule("a whole number >= 1", whole, lambda v: v >= 1)
BASE = Rule("a number >= 1", number, lambda v: v >= 1)
FRACTION = Rule("a number in (0, 1]", number, lambda v: 0 < v <= 1)
UNIT = Rule("a number in [0, 1]", number, lambda v: 0 <= v <= 1)
WITHIN_100 = Rule("a number in [0, 100]", number, lambda v: 0 <= v <= 100)
PERCENTILE = Rule("a number > 0 and < 100", number, lambda v: 0 < v < 100)
SHARE = Rule("a number in (0, 1), for example 0.95", number, lambda v: 0 < v < 1)
SWITCH = Rule("true or false", lambda v: v if isinstance(v, bool) else None)


def checked(default: Any, rule: Rule) -> Any:
    """A field of a dataclass, with its rule; see `check_fields`."""
    return field(default=default, metadata={"rule": rule})


def check_fields(instance: Any) -> None:
    """Check the fields of a frozen dataclass, and keep Python's own types of their values."""
    for f in fields(instance):
        if rule := f.metadata.get("rule"):
            value = getattr(instance, f.name)
            found = rule(f.name, value)
            # scikit-learn's `clone` asks for the very object.
            if pickle.dumps(found) != pickle.dumps(value):
                object.__setattr__(instance, f.name, found)


def check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise ConfigError unless low <= high."""
    if low > high:
        raise ConfigError(f"{low_name} must be <= {high_name}, got {low} > {high}")


def check_percentiles(low: float, high: float) -> None:
    """Raise ConfigError unless 0 <= low < high <= 100."""
    WITHIN_100("percentile_low", low)
    WITHIN_100("percentile_high", high)
    if low >= high:
        raise ConfigError(f"percentile_low must be < percentile_high, got {low} and {high}")
