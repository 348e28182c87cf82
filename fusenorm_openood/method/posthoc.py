"""Post-hoc experts that need no forward pass but the one that is scored, by OpenOOD's names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fusenorm_openood.errors import ConfigError, number, whole
from fusenorm_openood.method.covariance import (
    mds_fit,
    mds_score,
    mds_score_fit,
    mds_sums,
    vim_fit,
    vim_score,
    vim_sums,
)
from fusenorm_openood.method.distances import (
    knn_fit,
    knn_score,
    knn_score_fit,
    she_fit,
    she_score,
    she_score_fit,
    she_sums,
)
from fusenorm_openood.method.head import fdbd_fit, fdbd_score, gen_score, nci_fit, nci_score
from fusenorm_openood.method.seen import (
    Arguments,
    Fit,
    Head,
    Score,
    ScoreFit,
    Seen,
    State,
    Sums,
    feature_sum,
    fit_nothing,
    in_sample,
    no_sums,
)
from fusenorm_openood.method.shaping import ash_score, scale_score

__all__ = ["POSTHOC", "Head", "PosthocExpert", "Seen", "State", "check_arguments"]

METRICS = ("inner_product", "cosine", "euclidean")


def _one(arguments: Arguments, features: int, classes: int) -> int:
    return 1


def _one_neighbour_more(arguments: Arguments, features: int, classes: int) -> int:
    return int(arguments["K"]) + 1


def _one_per_feature(arguments: Arguments, features: int, classes: int) -> int:
    return features


def _one_per_feature_and_class(arguments: Arguments, features: int, classes: int) -> int:
    return features + classes  # less a mean per class


@dataclass(frozen=True)
class PosthocExpert:
    """An expert as four functions; what it is fitted on comes as a stream of blocks.

    Attributes:
        title: name in tables.
        sums: what adds up over blocks of ID images: (seen, labels `[N]`) -> tensors on the CPU, in
            float64. Labels are the predicted classes where there are no others.
        finish: the state from the sums over all ID images, and a sample of these: (sums, sample,
            head, arguments) -> state on the CPU.
        score: (seen, head, state, arguments) -> scores `[B]`, float32, larger = more
            in-distribution; all tensors on one device.
        score_fit: `score` of images of the sample, for ID statistics, each left out of what was
            fitted where the expert allows it (KNN, MDS++, SHE): (seen, head, state, arguments,
            labels `[B]`) -> scores `[B]`.
        arguments: the arguments with their defaults, by OpenOOD's names.
        enough: how many ID images a fit takes: (arguments, features, classes) -> images.
    """

    title: str
    sums: Sums
    finish: Fit
    score: Score
    score_fit: ScoreFit
    arguments: Mapping[str, float | bool | str] = field(default_factory=dict)
    enough: Callable[[Arguments, int, int], int] = _one

    def fit(self, seen: Seen, labels: Tensor, head: Head, arguments: Arguments) -> State:
        """The state from all ID images at once."""
        return self.finish(self.sums(seen, labels), seen, head, arguments)


POSTHOC: dict[str, PosthocExpert] = {
    "knn": PosthocExpert(
        "KNN",
        no_sums,
        knn_fit,
        knn_score,
        knn_score_fit,
        {"K": 50},
        enough=_one_neighbour_more,
    ),
    "nci": PosthocExpert(
        "NCI", feature_sum, nci_fit, nci_score, in_sample(nci_score), {"alpha": 0.0001}
    ),
    "gen": PosthocExpert(
        "GEN", no_sums, fit_nothing, gen_score, in_sample(gen_score), {"gamma": 0.1, "M": 100}
    ),
    "fdbd": PosthocExpert(
        "fDBD",
        feature_sum,
        fdbd_fit,
        fdbd_score,
        in_sample(fdbd_score),
        {"distance_as_normalizer": True},
    ),
    "scale": PosthocExpert(
        "SCALE", no_sums, fit_nothing, scale_score, in_sample(scale_score), {"percentile": 85}
    ),
    "ash": PosthocExpert(
        "ASH", no_sums, fit_nothing, ash_score, in_sample(ash_score), {"percentile": 90}
    ),
    "vim": PosthocExpert(
        "ViM",
        vim_sums,
        vim_fit,
        vim_score,
        in_sample(vim_score),
        {"dim": 256},
        enough=_one_per_feature,
    ),
    "mds": PosthocExpert(
        "MDS++",
        mds_sums,
        mds_fit,
        mds_score,
        mds_score_fit,
        enough=_one_per_feature_and_class,
    ),
    "she": PosthocExpert(
        "SHE", she_sums, she_fit, she_score, she_score_fit, {"metric": METRICS[0]}
    ),
}


def _as_given(value: Any) -> Any:
    return value


# What an argument must be, the value that is kept of one, and whether that is in its range.
_RANGES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], bool]]] = {
    "K": ("an integer >= 1", whole, lambda v: v >= 1),
    "M": ("an integer >= 1", whole, lambda v: v >= 1),
    "dim": ("an integer >= 1", whole, lambda v: v >= 1),
    "alpha": ("a finite number >= 0", number, lambda v: v >= 0),
    "gamma": ("a finite number > 0", number, lambda v: v > 0),
    "percentile": ("a number >= 0 and < 100", number, lambda v: 0 <= v < 100),
    "distance_as_normalizer": ("true or false", _as_given, lambda v: isinstance(v, bool)),
    "metric": (
        f"one of {', '.join(METRICS)}",
        _as_given,
        lambda v: isinstance(v, str) and v in METRICS,
    ),
}


class Posthoc(NamedTuple):
    """A post-hoc expert with all of its arguments."""

    name: str
    arguments: tuple[tuple[str, float | bool | str], ...]

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any] | None = None) -> "Posthoc":
        """The expert of a name; see `check_arguments`."""
        return cls(name, tuple(check_arguments(name, arguments or {}).items()))

    def fitted(self, sums: State, sample: Seen, head: Head) -> State:
        """What the expert fits, in the order in which files keep it: products depend on it."""
        state = POSTHOC[self.name].finish(sums, sample, head, dict(self.arguments))
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
    found = dict(defaults)
    for key, value in arguments.items():
        if key not in defaults:
            known = f"choose from {', '.join(defaults)}" if defaults else "it has none"
            raise ConfigError(f"unknown argument {key!r} of {name}: {known}")
        kind, read, is_valid = _RANGES[key]
        found[key] = read(value)
        if found[key] is None or not is_valid(found[key]):
            raise ConfigError(f"{key} of {name} must be {kind}, got {value!r}")
    return found
