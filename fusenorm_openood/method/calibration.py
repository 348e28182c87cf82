"""The confidences of calibration images, in groups, and which of them an image is compared with.

Source: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012 (Mondrian).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.errors import CalibrationError, ConfigError, unknown
from fusenorm_openood.method import conformal
from fusenorm_openood.method.conformal import Guarantee

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 19  # images with which one can be rejected at an acceptance of 95 %
PREDICTED = "predicted"
SHOWN = 5  # names in a message
Values = NDArray[np.float64]
Numbers = NDArray[np.int64]
# From images `[B, C, H, W]` and predicted classes `[B]` to the name or number of each group.
GroupsOf = Callable[["Tensor", Numbers], Any]


class Calibrated(NamedTuple):
    """One call of `calibrate`: when it was (UTC), how many of its images are kept, from where."""

    when: str
    images: int
    source: str


@dataclass(frozen=True)
class Calibration:
    """Confidences of calibration images, by group.

    A group with at least `least` images has its own scores. All other groups share the scores of
    the groups with at most `least` images, or, if these are fewer than `least` together, of all
    images. So which scores an image is compared with depends on no score and on no acceptance. (A
    group with exactly `least` images is in both: without it, the images of the others would not be
    exchangeable with those that they are compared with.)

    Attributes:
        scores: confidences `[n]`, the oldest first.
        marks: what tells the images from each other `[M, n]`.
        history: the calls of `calibrate` that gave them, the oldest first.
        by: what the groups are: `"predicted"` = predicted classes, None = one group, else a key of
            the batches that `calibrate` was given, or the name of a function.
        names: names of the groups `[G]`.
        group: the number of each image's group `[n]`.
        least: the number of images with which a group has its own scores.
        function: the function, which neither a file nor a pickle keeps; None without one.
    """

    scores: Values
    marks: Values
    history: tuple[Calibrated, ...]
    by: str | None
    names: tuple[str, ...]
    group: Numbers
    least: int = LEAST
    function: GroupsOf | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "function": None}

    def __deepcopy__(self, memo: Any) -> "Calibration":
        return self  # nothing changes it, and a copy has the function

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def counts(self) -> Numbers:
        """Numbers of images `[G]` of the groups."""
        return np.bincount(self.group, minlength=len(self.names)).astype(np.int64)

    @cached_property
    def cells(self) -> tuple[Values, ...]:
        """The different sets of scores that images are compared with, each sorted."""
        order = np.lexsort((self.scores, self.group))
        each = np.split(self.scores[order], np.cumsum(self.counts)[:-1])
        own = [scores for scores in each if len(scores) >= self.least]
        if len(own) == len(each):
            return tuple(own)
        return (*own, np.sort(self._pool if self.is_pooled else self.scores))

    @property
    def _pool(self) -> Values:
        pool: Values = self.scores[(self.counts <= self.least)[self.group]]
        return pool

    @property
    def is_pooled(self) -> bool:
        """Whether groups with few images have enough of them together."""
        return len(self._pool) >= self.least

    @cached_property
    def cell_of(self) -> Numbers:
        """The number of each group's set of scores `[G]`."""
        own = self.counts >= self.least
        return np.where(own, np.cumsum(own) - 1, own.sum()).astype(np.int64)

    @property
    def pooled(self) -> list[int]:
        """Numbers of the groups without scores of their own."""
        few: list[int] = np.flatnonzero(self.counts < self.least).tolist()
        return few if self.by else []

    def cell(self, group: int) -> Values:
        """What images of a group are compared with, sorted."""
        return self.cells[int(self.cell_of[group])]

    def p_values(self, conf: Any, group: Numbers) -> Values:
        """Conformal p-values `[B]` of images with these confidences and numbers of groups `[B]`."""
        conf, cell = np.asarray(conf, np.float64), self.cell_of[group]
        p = np.empty(conf.shape)
        for number in np.unique(cell):
            p[cell == number] = conformal.conformal_p_values(
                conf[cell == number], self.cells[number]
            )
        return p

    def numbers(self, pred: Numbers, groups: Any = None, images: "Tensor | None" = None) -> Numbers:
        """The number of each image's group `[B]`, by predicted classes `[B]` or names of groups.

        A function that is known gives the groups of images `[B, C, H, W]`. ConfigError for groups
        that are missing, unknown, too many, or that are not asked for.
        """
        if self.by in (None, PREDICTED):
            if groups is not None:
                by = f"are by {self.by}, not by given groups" if self.by else "are not by groups"
                raise ConfigError(f"the calibration images {by}: leave out groups")
            return pred if self.by else np.zeros_like(pred)
        if groups is None and self.function is not None and images is not None:
            groups = self.function(images, pred)
        given = () if groups is None else group_names(groups)
        if len(given) != len(pred):
            raise ConfigError(
                f"groups must be the {self.by} of {len(pred)} images, got {len(given)}: give "
                "groups=, for this is what the calibration images are grouped by, and a file keeps "
                "only the name of a function"
            )
        return np.array([self.number(name) for name in given], np.int64)

    def number(self, name: str) -> int:
        """The number of a group; ConfigError if no group has this name, or there are no groups."""
        if self.by is None:
            raise ConfigError("the calibration images are not by groups: leave out group")
        if name not in self.names:
            raise ConfigError(unknown("group", name, self.names))
        return self.names.index(name)

    def check_enough(self, acceptance: float) -> None:
        """Raise CalibrationError unless an image of each group can be rejected."""
        fewest = min(range(len(self.names)), key=lambda group: len(self.cell(group)))
        n, needed = len(self.cell(fewest)), conformal.needed_images(acceptance)
        of = f" for group {self.names[fewest]!r} (with least={needed} it is pooled)"
        is_own = self.by and self.least < needed <= len(self)
        conformal.check_enough(n, acceptance, of if is_own else "")

    def max_ranks(self, acceptance: float) -> list[int]:
        """For each group, the largest rank with which an image is OOD; see `max_rank`."""
        self.check_enough(acceptance)
        by_cell = [conformal.max_rank(acceptance, len(scores)) for scores in self.cells]
        return [by_cell[cell] for cell in self.cell_of]

    def thresholds(self, acceptance: float) -> Values:
        """The smallest confidence that is accepted in each group `[G]`."""
        self.check_enough(acceptance)
        by_cell = np.array([conformal.threshold(scores, acceptance) for scores in self.cells])
        return by_cell[self.cell_of]

    def guarantee(
        self, acceptance: float, confidence: float = 0.95, group: int | None = None
    ) -> Guarantee:
        """What the images of a group promise; errors as in `Detector.guarantee`."""
        if self.by is None:
            return conformal.guarantee(len(self), acceptance, confidence)
        if group is None or not 0 <= group < len(self.names):
            raise ConfigError(
                f"group must be one of {listed(self.names)}, got {group}: each has its guarantee"
            )
        of, n = f"ID images of group {self.names[group]}", len(self.cell(group))
        if self.counts[group] < self.least:
            if not self.is_pooled:
                raise CalibrationError(
                    f"nothing is promised for group {self.names[group]!r}: groups with fewer than "
                    f"{self.least} calibration images have {len(self._pool)} together, so theirs "
                    "are compared with all: calibrate on more"
                )
            of = f"ID images of the {len(self.pooled)} pooled groups together"
        return replace(conformal.guarantee(n, acceptance, confidence), of=of)

    def check_mergeable(self, by: str | None) -> None:
        """Raise ConfigError if new images are grouped in another way."""
        if by != self.by:
            raise ConfigError(
                f"calibration images grouped by {self.by} cannot be merged with new ones grouped "
                f"by {by}: choose the same, or calibrate without merge"
            )

    def then(self, new: "Calibration") -> "Calibration":
        """This calibration with newer images; ConfigError if their groups are others."""
        self.check_mergeable(new.by)
        names = tuple(dict.fromkeys((*self.names, *new.names)))
        renamed = np.array([names.index(name) for name in new.names], np.int64)[new.group]
        return replace(
            new,
            scores=np.concatenate([self.scores, new.scores]),
            marks=np.hstack([self.marks, new.marks]),
            history=(*self.history, *new.history),
            names=names,
            group=np.concatenate([self.group, renamed]),
        )

    def keep(self, images: Numbers) -> "Calibration":
        """These images alone, given by their sorted numbers."""
        calls = np.repeat(range(len(self.history)), [call.images for call in self.history])
        kept = np.bincount(calls[images], minlength=len(self.history)).tolist()
        calls_kept = (c._replace(images=n) for c, n in zip(self.history, kept, strict=True) if n)
        return replace(
            self,
            scores=self.scores[images],
            marks=self.marks[:, images],
            history=tuple(calls_kept),
            group=self.group[images],
        )

    def __str__(self) -> str:
        calls = [f"{c.images:,} from {c.source}, {c.when[:10]}" for c in self.history[-2:]]
        if earlier := len(self.history) - len(calls):
            calls.insert(0, f"{earlier} earlier")
        by = f" by {self.by}" if self.by else ""
        return f"calibrated on {len(self):,}{by} ({'; '.join(calls)})"


def by_group(scores: Values, group: Numbers, names: Sequence[str]) -> dict[str, Values]:
    """Scores `[n]` by the names of their groups, given by numbers `[n]`; two may have one name."""
    named = np.array(names)[group]
    return {name: scores[named == name] for name in names}


def group_names(groups: Any) -> list[str]:
    """Names of groups: strings, integers or a tensor of these."""
    given = groups.tolist() if hasattr(groups, "tolist") else groups  # also of a GPU
    return [str(value) for value in np.atleast_1d(np.asarray(given)).tolist()]


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
