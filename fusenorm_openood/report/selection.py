"""What a report keeps of judged files, however many: a number for each, and a few rows."""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.detectors.folder import Judged
from fusenorm_openood.errors import DataError
from fusenorm_openood.method.conformal import conformal_p_values, rejects

CHUNK = 10_000  # rows that are looked at together
FAULTY = 10  # unreadable files that are kept
REJECTED, DOUBTFUL, TRUSTED = "Most rejected", "Most doubtful", "Most trusted"


@dataclass
class Selection:
    """What is kept of judged files.

    Attributes:
        confidences: confidences `[N]` of the readable files.
        objected: number of rejected files by the expert that objected most.
        rejected: number of rejected files.
        unreadable: number of unreadable files.
        faulty: the first unreadable files.
        chosen: readable files to show, by group; a file is in one group only.
    """

    confidences: "array[float]" = field(default_factory=lambda: array("d"))
    objected: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    unreadable: int = 0
    faulty: list[Judged] = field(default_factory=list)
    chosen: dict[str, list[Judged]] = field(default_factory=dict)


def select(
    rows: Iterable[Judged],
    reference: NDArray[np.float64] | None,
    acceptance: float,
    cut: float | None,
    per_group: int,
) -> Selection:
    """Look at rows once, and keep little of them.

    Args:
        rows: the judgements.
        reference: confidences of the calibration images; None = no verdicts.
        acceptance: share of ID images to accept.
        cut: the threshold of the confidence at this acceptance.
        per_group: number of files to choose for each group.

    Raises:
        DataError: the p-values are not those of this detector.
    """
    seen, rows = Selection(), iter(rows)
    nearest: dict[str, Callable[[Judged], float]] = {
        REJECTED: _confidence,
        TRUSTED: lambda row: -_confidence(row),
    }
    if cut is not None:
        nearest[DOUBTFUL] = lambda row: abs(_confidence(row) - cut)
    kept: dict[str, list[Judged]] = {name: [] for name in nearest}
    while chunk := list(islice(rows, CHUNK)):
        faulty = [row for row in chunk if row.confidence is None]
        seen.unreadable += len(faulty)
        seen.faulty += faulty[: FAULTY - len(seen.faulty)]
        judged = [row for row in chunk if row.confidence is not None]
        conf = np.array([row.confidence for row in judged], np.float64)
        seen.confidences.extend(conf)
        ood = np.zeros(len(judged), bool)
        if reference is not None:
            p = conformal_p_values(conf, reference)
            _check_p_values(judged, p)
            ood = rejects(p, acceptance)
        seen.rejected += int(ood.sum())
        seen.objected.update(
            row.objected for row, out in zip(judged, ood, strict=True) if out and row.objected
        )
        for name, distance in nearest.items():
            wanted = judged
            if reference is not None and name != DOUBTFUL:
                wanted = [
                    r for r, out in zip(judged, ood, strict=True) if out == (name == REJECTED)
                ]
            # Some may be in another group already.
            kept[name] = heapq.nsmallest(3 * per_group, [*kept[name], *wanted], key=distance)
    taken: set[str] = set()
    for name in kept:
        free = [row for row in kept[name] if row.path not in taken][:per_group]
        taken.update(row.path for row in free)
        seen.chosen[name] = free
    order = (REJECTED, DOUBTFUL, TRUSTED)
    seen.chosen = {name: seen.chosen[name] for name in order if seen.chosen.get(name)}
    return seen


def _confidence(row: Judged) -> float:
    assert row.confidence is not None  # of a readable file
    return row.confidence


def _check_p_values(judged: list[Judged], p: NDArray[Any]) -> None:
    for row, value in zip(judged, p, strict=True):
        if row.p_value is not None and abs(row.p_value - value) > 1e-6:
            raise DataError(
                f"{row.path} was judged by another detector: its p-value is {row.p_value:g}, with "
                f"this one it is {value:g}: give the detector that judged it, or score again"
            )
