"""The scores of an evaluation: confidences and every expert's, ID against OOD."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.benchmark.evaluation import Evaluation
from fusenorm_openood.detectors.base import Scored
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.report.content import Section
from fusenorm_openood.report.figures import Series, histogram, mean_roc, roc
from fusenorm_openood.report.sections import ENDS, GROUPS

Values = NDArray[np.float64]


class Score(NamedTuple):
    """One score of all tested images, larger = more in-distribution.

    Attributes:
        name: `confidence`, an expert or a method.
        known: its values on ID images `[N]`.
        unknown: its values on OOD images, by group and data set.
    """

    name: str
    known: Values
    unknown: Mapping[str, Mapping[str, Values]]

    def pooled(self, group: str) -> Values:
        """Its values on all OOD images of a group."""
        return np.concatenate(list(self.unknown[group].values()))

    def figures(self, group: str) -> tuple[float, float]:
        """AUROC and FPR@95 in percent, the means over the data sets of a group."""
        each = [ood_metrics(self.known, values) for values in self.unknown[group].values()]
        return tuple(100 * np.mean([(m.auroc, m.fpr95) for m in each], axis=0))


def known_sets(result: Evaluation) -> list[Scored]:
    """What the detector gave for the ID images, covariate-shifted ones last."""
    return [s for group in ("id", "csid") for s in result.sets[group].values()]


def scores_of(result: Evaluation) -> list[Score]:
    """The confidence of an evaluation, and the scores of FuseNorm's experts."""
    known = known_sets(result)
    unknown = {group: result.sets[group] for group in GROUPS if result.sets.get(group)}
    conf = Score(
        "confidence",
        np.concatenate([s.conf for s in known]),
        {g: {n: s.conf for n, s in sets.items()} for g, sets in unknown.items()},
    )
    if not isinstance(result.detector, FuseNorm):
        return [conf]
    return [
        conf,
        *(
            Score(
                expert,
                np.concatenate([s.experts[row] for s in known]),
                {g: {n: s.experts[row] for n, s in sets.items()} for g, sets in unknown.items()},
            )
            for row, expert in enumerate(result.detector.experts)
        ),
    ]


def histograms_section(scores: list[Score], cut: float | None = None) -> Section:
    """The distribution of every score, ID against OOD; `cut` is the threshold of the first."""
    figures = []
    for number, score in enumerate(scores):
        merits = tuple(
            "{} AUROC {:.2f}, FPR@95 {:.2f}".format(GROUPS[group], *score.figures(group))
            for group in score.unknown
        )
        others = [Series(GROUPS[group], score.pooled(group)) for group in score.unknown]
        known, line = Series("ID", score.known), cut if number == 0 else None
        figures.append(histogram(score.name, known, others, "score", line, lines=merits))
    text = (
        f"Larger = more in-distribution. {ENDS} AUROC and FPR@95 in percent are means over the "
        "data sets, as in the table."
    )
    return Section("Scores of ID and OOD images", (text,), figures=tuple(figures))


def roc_section(scores: list[Score], shown: int = 4) -> Section:
    """ROC curves of the first score and of the others, the best of which are named."""
    figures = []
    for group in scores[0].unknown:
        merit = {score.name: score.figures(group)[0] for score in scores}
        first, *rest = scores
        rest.sort(key=lambda score: -merit[score.name])
        curves = {
            f"{score.name} ({merit[score.name]:.2f})": mean_roc(
                score.known, list(score.unknown[group].values())
            )
            for score in (first, *rest)
        }
        figures.append(roc(f"{GROUPS[group]} (AUROC in percent)", curves, shown))
    text = (
        "OOD is the positive class; curves are means over the data sets, so the area below one is "
        "the AUROC of the table."
    )
    return Section("ROC curves", (text,), figures=tuple(figures))
