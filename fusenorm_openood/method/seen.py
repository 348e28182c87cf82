"""What a post-hoc expert sees of a batch of images, and what it may compute from it."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor

from fusenorm_openood.errors import DataError
from fusenorm_openood.kernels.devices import following, full_precision

State = dict[str, Tensor]  # what an expert fits, on the CPU
Arguments = Mapping[str, Any]
PART_BYTES = 2**26  # largest matrix of distances held at once
EPS = 1e-12  # smallest norm that is divided by


class Seen(NamedTuple):
    """What an expert sees of B images."""

    feature: Tensor  # [B, D], the input of the final linear layer
    logits: Tensor  # [B, K], that scores are computed from


class Head(NamedTuple):
    """The final linear layer."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K], zeros if the layer has none

    def __call__(self, feature: Tensor) -> Tensor:
        """Logits `[B, K]` of features `[B, D]`."""
        return feature @ self.weight.T + self.bias


Sums = Callable[[Seen, Tensor], State]
Fit = Callable[[State, Seen, Head, Arguments], State]
Score = Callable[[Seen, Head, State, Arguments], Tensor]
ScoreFit = Callable[[Seen, Head, State, Arguments, Tensor], Tensor]
P = ParamSpec("P")


def in_float32(
    score: Callable[Concatenate[Seen, Head, State, P], Tensor],
) -> Callable[Concatenate[Seen, Head, State, P], Tensor]:
    """A score computed in float32, whatever the precision given, and without gradients.

    It is computed where the feature is, as it was recorded or heard: head and state go there.
    """

    @wraps(score)
    def wrapped(
        seen: Seen, head: Head, state: State, /, *args: P.args, **kwargs: P.kwargs
    ) -> Tensor:
        device = seen.feature.device
        with torch.no_grad(), full_precision(device):
            seen = Seen(*(t.float() for t in seen))
            head = Head(*(following(t.float(), device) for t in head))
            state = {name: following(t, device) for name, t in state.items()}
            return score(seen, head, state, *args, **kwargs)

    return wrapped


def in_sample(score: Score) -> ScoreFit:
    """The score of an expert that does not leave out an image of its fit."""
    return partial(_without_labels, score)


def _without_labels(
    score: Score, seen: Seen, head: Head, state: State, arguments: Arguments, labels: Tensor
) -> Tensor:
    return score(seen, head, state, arguments)


def norms(rows: Tensor) -> Tensor:
    """L2 norm of each row of `[B, D]`."""
    return rows.square().sum(dim=1).sqrt()


def rows_per_part(columns: int) -> int:
    """How many rows of a float32 matrix with so many columns fit into `PART_BYTES`."""
    return max(1, PART_BYTES // (4 * max(1, columns)))


def row_parts(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Parts of rows that each make so many columns of a float32 matrix; whole in a trace."""
    return (rows,) if torch.compiler.is_compiling() else torch.split(rows, rows_per_part(columns))


def fit_features(seen: Seen) -> Tensor:
    """Features `[N, D]` to fit an expert on: float32, on the CPU.

    Raises:
        DataError: no images.
    """
    if len(seen.feature) == 0:
        raise DataError("experts are fitted on at least one ID image, got none")
    return seen.feature.detach().cpu().float()


def fit_labels(labels: Tensor, seen: Seen) -> Tensor:
    """Labels `[N]` on the CPU.

    Raises:
        DataError: not one label per image, or labels that are no class of the network.
    """
    labels, classes = labels.detach().cpu().long(), seen.logits.shape[1]
    if labels.shape != (len(seen.feature),):
        raise DataError(
            f"labels must be one class per image, got shape {tuple(labels.shape)} for "
            f"{len(seen.feature)} images"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels must be from 0 to {classes - 1}, got {low if low < 0 else high}: fit on "
            "images of the network's classes"
        )
    return labels


def no_sums(seen: Seen, labels: Tensor) -> State:
    """For an expert that is fitted on the sample alone, or not at all."""
    return {}


def fit_nothing(sums: State, sample: Seen, head: Head, arguments: Arguments) -> State:
    """For an expert that needs no ID images."""
    return {}


def feature_sum(seen: Seen, labels: Tensor) -> State:
    """Sum of the features `[D]`, and the number of images."""
    feature = fit_features(seen)
    images = torch.tensor(len(feature), device=feature.device)
    return {"feature": feature.sum(dim=0, dtype=torch.float64), "images": images}


def mean_feature(sums: State) -> Tensor:
    """Mean feature `[D]`, in float64, from a `feature_sum`."""
    return sums["feature"] / sums["images"]


def products(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows `[N, D]` with themselves: `[D, D]` in float64."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in torch.split(rows, rows_per_part(2 * rows.shape[1])):
        total.addmm_(part.double().T, part.double())
    return total


def class_sums(feature: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum `[K, D]` of each class's features, in float64, and its number of images `[K]`."""
    sums = feature.new_zeros(classes, feature.shape[1], dtype=torch.float64)
    counts = torch.bincount(labels, minlength=classes)
    return sums.index_add_(0, labels, feature.double()), counts
