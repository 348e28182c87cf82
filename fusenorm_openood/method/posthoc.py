"""Post-hoc experts that need no forward pass but the one that is scored, by OpenOOD's names."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.covariance import (
    mds_fit,
    mds_score,
    mds_score_fit,
    vim_fit,
    vim_score,
)
from fusenorm_openood.method.distances import (
    knn_fit,
    knn_score,
    knn_score_fit,
    she_fit,
    she_score,
    she_score_fit,
)
from fusenorm_openood.method.head import (
    fdbd_fit,
    fdbd_score,
    gen_fit,
    gen_score,
    nci_fit,
    nci_score,
)
from fusenorm_openood.method.seen import Arguments, Head, Score, Seen, State
from fusenorm_openood.method.shaping import ash_score, fit_nothing, scale_score

__all__ = ["POSTHOC", "Head", "PosthocExpert", "Seen", "State", "check_arguments"]

METRICS = ("inner_product", "cosine", "euclidean")


@dataclass(frozen=True)
class PosthocExpert:
    """An expert as three functions.

    Attributes:
        title: name in tables.
        fit: computes the state from ID images: (seen, labels `[N]`, head, arguments) -> state on
            the CPU. Labels are the predicted classes where there are no others.
        score: (seen, head, state, arguments) -> scores `[B]`, float32, larger = more
            in-distribution; all tensors on one device.
        score_fit: `score` of the images of the fit, for ID statistics, each left out of what was
            fitted where the expert allows it (KNN, MDS, SHE).
        arguments: the arguments with their defaults, by OpenOOD's names.
    """

    title: str
    fit: Callable[[Seen, Tensor, Head, Arguments], State]
    score: Score
    score_fit: Score
    arguments: Mapping[str, float | bool | str] = field(default_factory=dict)


POSTHOC: dict[str, PosthocExpert] = {
    "knn": PosthocExpert("KNN", knn_fit, knn_score, knn_score_fit, {"K": 50}),
    "nci": PosthocExpert("NCI", nci_fit, nci_score, nci_score, {"alpha": 0.0001}),
    "gen": PosthocExpert("GEN", gen_fit, gen_score, gen_score, {"gamma": 0.1, "M": 100}),
    "fdbd": PosthocExpert(
        "fDBD", fdbd_fit, fdbd_score, fdbd_score, {"distance_as_normalizer": True}
    ),
    "scale": PosthocExpert("SCALE", fit_nothing, scale_score, scale_score, {"percentile": 85}),
    "ash": PosthocExpert("ASH", fit_nothing, ash_score, ash_score, {"percentile": 90}),
    "vim": PosthocExpert("ViM", vim_fit, vim_score, vim_score, {"dim": 256}),
    "mds": PosthocExpert("MDS", mds_fit, mds_score, mds_score_fit),
    "she": PosthocExpert("SHE", she_fit, she_score, she_score_fit, {"metric": METRICS[0]}),
}

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "K": ("an integer >= 1", lambda v: _is_integer(v) and v >= 1),
    "M": ("an integer >= 1", lambda v: _is_integer(v) and v >= 1),
    "dim": ("an integer >= 1", lambda v: _is_integer(v) and v >= 1),
    "alpha": ("a finite number >= 0", lambda v: _is_finite(v) and v >= 0),
    "gamma": ("a finite number > 0", lambda v: _is_finite(v) and v > 0),
    "percentile": ("a number >= 0 and < 100", lambda v: _is_finite(v) and 0 <= v < 100),
    "distance_as_normalizer": ("true or false", lambda v: isinstance(v, bool)),
    "metric": (f"one of {', '.join(METRICS)}", lambda v: isinstance(v, str) and v in METRICS),
}


class Posthoc(NamedTuple):
    """A post-hoc expert with all of its arguments."""

    name: str
    arguments: tuple[tuple[str, float | bool | str], ...]

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any] | None = None) -> "Posthoc":
        """The expert of a name; see `check_arguments`."""
        return cls(name, tuple(check_arguments(name, arguments or {}).items()))

    def fit(self, seen: Seen, labels: Tensor, head: Head) -> State:
        """What the expert fits, in the order in which files keep it: products depend on it."""
        state = POSTHOC[self.name].fit(seen, labels, head, dict(self.arguments))
        return {name: value.contiguous() for name, value in state.items()}


def check_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The expert's arguments, with defaults for those not given.

    Raises:
        ConfigError: an unknown expert or argument, a wrong type or a value outside its range.

    >>> check_arguments("gen", {"M": 10})
    {'gamma': 0.1, 'M': 10}
    """
    if name not in POSTHOC:
        raise ConfigError(f"unknown post-hoc expert {name!r}: choose from {', '.join(POSTHOC)}")
    defaults = POSTHOC[name].arguments
    for key, value in arguments.items():
        if key not in defaults:
            known = f"choose from {', '.join(defaults)}" if defaults else "it has none"
            raise ConfigError(f"unknown argument {key!r} of {name}: {known}")
        kind, is_valid = _RANGES[key]
        if not is_valid(value):
            raise ConfigError(f"{key} of {name} must be {kind}, got {value!r}")
    return {**defaults, **arguments}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
