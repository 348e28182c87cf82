"""What every score has in common: its inputs, its two methods, and sums over ID images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fusenorm_openood.errors import DataError
from fusenorm_openood.kernels.devices import full_precision, with_double
from fusenorm_openood.method.validation import PERCENTILE, POSITIVE, SWITCH, check_fields, checked

State = dict[str, Tensor]  # what a score fits
PART_BYTES = 2**26  # largest matrix of distances held at once
EPS = 1e-12  # smallest norm that is divided by
ROUNDING = float(torch.finfo(torch.float32).eps)


class Features(NamedTuple):
    """What a score is computed from, for B images."""

    feature: Tensor  # [B, D], the input of the final linear layer
    logits: Tensor  # [B, K]


class Head(NamedTuple):
    """The final linear layer."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K], zeros if the layer has none

    def __call__(self, feature: Tensor) -> Tensor:
        """Logits `[B, K]` of features `[B, D]`."""
        return feature @ self.weight.T + self.bias


NO_HEAD = Head(*(torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((0, 1), (0,))))


@dataclass(frozen=True)
class Score:
    """A score of images, larger = more in-distribution, with its arguments as fields.

    A subclass in a module of its own implements `score` and, if it has something to fit, `fit` and
    `sums`. Its name and its arguments are OpenOOD's.
    """

    name: ClassVar[str]  # as a postprocessor
    title: ClassVar[str]  # in tables
    needs_fit: ClassVar[bool] = False  # whether it needs ID images
    needs_feature: ClassVar[bool] = True  # whether it needs more than the logits
    # Whether it reads the final layer's weights: "affine", or "linear" if it applies them to
    # changed features.
    needs_head: ClassVar[str] = ""
    needs_t2fnorm: ClassVar[bool] = False  # whether it needs a network trained with T2FNorm
    # What `fit` returns: shapes by name, with D features, K classes and other letters for sizes
    # that are not known beforehand. `counts` and `classes` are integers.
    state: ClassVar[Mapping[str, str]] = {}
    # The arguments that a configuration may give; None = all.
    named: ClassVar[tuple[str, ...] | None] = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def clip_percentile(self) -> float | None:
        """Percentile of ID activations at which ReAct clips the feature; None = no ReAct."""
        return None

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs the gradient of the logits with respect to the images."""
        return False

    @classmethod
    def arguments(cls) -> dict[str, Any]:
        """The arguments that a configuration may give, with their defaults."""
        return {f.name: f.default for f in fields(cls) if cls.named is None or f.name in cls.named}

    def to_json(self) -> list[Any]:
        """Name and arguments in terms of JSON."""
        return [self.name, asdict(self)]

    def sums(self, batch: Features, labels: Tensor) -> State:
        """What adds up over blocks of ID images with labels `[B]`: float64, on the CPU."""
        return {}

    def fit(self, sums: State, sample: Features, head: Head) -> State:
        """The state, from the sums over all ID images and a sample of them."""
        return {}

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        """Scores `[B]`."""
        raise NotImplementedError

    def score_fit(self, batch: Features, head: Head, state: State, labels: Tensor) -> Tensor:
        """`score` of images of the sample, each left out of what was fitted where that is possible.

        In-sample scores would be far too high for few ID images.
        """
        return self.score(batch, head, state)

    def shrinkage(self, state: State) -> float:
        """The share in [0, 1] of what was fitted that was assumed; it lessens the trust."""
        return 0.0

    def images_needed(self, features: int, classes: int) -> int:
        """How many ID images a fit needs."""
        return 1

    def __call__(
        self,
        batch: Features,
        head: Head = NO_HEAD,
        state: State | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Scores `[B]`, in float32 unless a score says otherwise.

        The head is needed if `needs_head`, the state if `needs_fit`, both in float32 on the device
        of the features; labels `[B]` are those of images of the fit, see `score_fit`.
        """
        with torch.no_grad(), full_precision(batch.feature.device):
            batch = Features(batch.feature.float(), batch.logits.float())
            if labels is None:
                return self.score(batch, head, state or {})
            return self.score_fit(batch, head, state or {}, labels)


@dataclass(frozen=True)
class LogitScore(Score):
    """A score of the logits alone."""

    needs_feature: ClassVar[bool] = False
    named: ClassVar[tuple[str, ...] | None] = ()
    output: ClassVar[str] = ""  # value of the setting `output` that selects it; empty if none does

    temperature: float = checked(1.0, POSITIVE)  # divides the logits
    # Percentile of the penultimate ID activations at which ReAct clips them; None = no ReAct.
    react_percentile: float | None = checked(None, PERCENTILE.or_none())
    # Whether it is one of FuseNorm's experts: it is then computed in float64, and as log-odds where
    # it is a probability, which saturates.
    fused: bool = checked(False, SWITCH)

    @property
    def clip_percentile(self) -> float | None:
        return self.react_percentile

    @property
    def label(self) -> str:
        """Name in tables of FuseNorm's experts, for example `energy+react`."""
        return self.output if self.react_percentile is None else f"{self.output}+react"

    def __call__(
        self,
        batch: Features,
        head: Head = NO_HEAD,
        state: State | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Scores `[B]`, in float64 if `fused`, else in the precision of the logits."""
        logits = with_double(batch.logits.detach())
        return self.of_logits(logits.double() if self.fused else logits)

    def of_logits(self, logits: Tensor) -> Tensor:
        """Scores `[B]` of logits `[B, K]`."""
        raise NotImplementedError


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the maximum softmax probability p: the same ranking, no saturation."""
    top, index = logits.max(dim=1)
    return top - logits.scatter(1, index.unsqueeze(1), float("-inf")).logsumexp(dim=1)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row of `[B, D]`."""
    return rows.square().sum(dim=1).sqrt()


def row_parts(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Parts of rows that each make so many columns of a float32 matrix; whole in a trace."""
    if torch.compiler.is_compiling():
        return (rows,)
    return torch.split(rows, max(1, PART_BYTES // (4 * max(1, columns))))


def fit_features(batch: Features) -> Tensor:
    """Features `[N, D]` to fit a score on: float32, on the CPU; DataError without images."""
    if len(batch.feature) == 0:
        raise DataError("scores are fitted on at least one ID image, got none")
    return batch.feature.detach().cpu().float()


def fit_labels(labels: Tensor, batch: Features) -> Tensor:
    """Labels `[N]` on the CPU; DataError unless each is a class of the network."""
    labels, classes = labels.detach().cpu().long(), batch.logits.shape[1]
    if labels.shape != (len(batch.feature),):
        raise DataError(
            f"labels must be one class per image, got shape {tuple(labels.shape)} for "
            f"{len(batch.feature)} images"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels must be from 0 to {classes - 1}, got {low if low < 0 else high}: fit on "
            "images of the network's classes"
        )
    return labels


def feature_sum(batch: Features) -> State:
    """Sum of the features `[D]`, and the number of images."""
    feature = fit_features(batch)
    images = torch.tensor(len(feature), device=feature.device)
    return {"feature": feature.sum(dim=0, dtype=torch.float64), "images": images}


def mean_feature(sums: State) -> Tensor:
    """Mean feature `[D]`, in float64, from a `feature_sum`."""
    return sums["feature"] / sums["images"]


def products(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows `[N, D]` with themselves: `[D, D]` in float64."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in torch.split(rows, max(1, PART_BYTES // (8 * rows.shape[1]))):
        total.addmm_(part.double().T, part.double())
    return total


def class_sums(feature: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum `[K, D]` of each class's features, in float64, and its number of images `[K]`."""
    sums = feature.new_zeros(classes, feature.shape[1], dtype=torch.float64)
    counts = torch.bincount(labels, minlength=classes)
    return sums.index_add_(0, labels, feature.double()), counts
