"""Sections that several reports share, and the facts about a detector."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import CalibrationError
from fusenorm_openood.method.calibration import Calibration
from fusenorm_openood.method.conformal import EQUAL, Guarantee, guarantee, needed_images
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import unwrapped
from fusenorm_openood.report import charts
from fusenorm_openood.report.charts import Series
from fusenorm_openood.report.page import Facts, Section, Table

Values = NDArray[np.float64]

GROUPS = {"nearood": "near-OOD", "farood": "far-OOD", "valood": "validation OOD"}
HEAT = "a heat map of the energy that a block's norm comes from (dark blue = none, yellow = most)"
ENDS = "The outermost bins also hold all images beyond them."


class Score(NamedTuple):
    """The values of a confidence, an expert or a method: of ID images `[N]`, and of OOD images."""

    name: str
    ids: Values
    ood: Mapping[str, Mapping[str, Values]]  # by group and data set

    def pooled(self, group: str) -> Values:
        """Its values on all OOD images of a group."""
        return np.concatenate(list(self.ood[group].values()))

    def figures(self, group: str) -> tuple[float, float]:
        """AUROC and FPR@95 in percent, the means over the data sets of a group."""
        each = [ood_metrics(self.ids, values) for values in self.ood[group].values()]
        return tuple(100 * np.mean([(m.auroc, m.fpr95) for m in each], axis=0))

    def counts(self) -> Facts:
        """The numbers of images."""
        groups = ((f"{GROUPS[g]} images", f"{len(self.pooled(g)):,}") for g in self.ood)
        return (("ID images", f"{len(self.ids):,}"), *groups)


def histograms_section(scores: Sequence[Score], cut: float | None = None) -> Section:
    """The distribution of every score, ID against OOD; `cut` is the threshold of the first."""
    figures = []
    for score in scores:
        metrics = tuple(
            "{} AUROC {:.2f}, FPR@95 {:.2f}".format(GROUPS[group], *score.figures(group))
            for group in score.ood
        )
        others = [Series(GROUPS[group], score.pooled(group)) for group in score.ood]
        line = cut if score is scores[0] else None
        ids = Series("ID", score.ids)
        figures.append(charts.histogram(score.name, ids, others, "score", line, lines=metrics))
    text = (
        f"Larger = more in-distribution. {ENDS} AUROC and FPR@95 in percent are means over the "
        "data sets, as in the table."
    )
    return Section("Scores of ID and OOD images", (text,), figures=tuple(figures))


def roc_section(scores: Sequence[Score]) -> Section:
    """ROC curves of the first score and of the others, the best of which are named."""
    figures = []
    for group in scores[0].ood:
        auroc = {score.name: score.figures(group)[0] for score in scores}
        rest = sorted(scores[1:], key=lambda score: -auroc[score.name])
        curves = {
            f"{score.name} ({auroc[score.name]:.2f})": charts.mean_roc(
                score.ids, list(score.ood[group].values())
            )
            for score in (scores[0], *rest)
        }
        figures.append(charts.roc(f"{GROUPS[group]} (AUROC in percent)", curves))
    text = (
        "OOD is the positive class; curves are means over the data sets, so the area below one is "
        "the AUROC of the table."
    )
    return Section("ROC curves", (text,), figures=tuple(figures))


def acceptance_section(
    images: int, ids: Series | None, others: Sequence[Series], asked: float, about: str
) -> Section:
    """Acceptance against rejection, with the guarantee; the series are p-values."""
    text = f"{about} At an acceptance of {asked:.0%}, {guarantee(images, asked)}."
    title = "Share of the images by the acceptance asked for"
    return Section(
        "Acceptance and rejection",
        (
            text[0].upper() + text[1:],
            "The band is where the accepted share of ID images lies with a probability of 95% "
            "(Beta distribution); between the dotted lines it lies at all acceptances at once "
            "(Dvoretzky, Kiefer, Wolfowitz). Both hold for ID images like the calibration images.",
        ),
        figures=(charts.acceptance_curves(title, images, ids, others, asked),),
    )


def groups_section(
    calibration: Calibration,
    names: Sequence[str],
    group: NDArray[np.int64],
    accepted: NDArray[np.bool_],
    asked: float,
) -> Section:
    """The accepted share of the scored images `[N]` of each predicted class, the smallest first."""

    def promise(number: int) -> Guarantee | None:
        try:
            return calibration.guarantee(asked, group=number)
        except CalibrationError:
            return None

    shares = sorted((float(accepted[group == g].mean()), int(g)) for g in np.unique(group))
    rows = [(names[g], share, promise(g)) for share, g in shares[: charts.MOST]]
    text = [
        f"At an acceptance of {asked:.0%}: the {len(rows)} lowest of {len(shares)} classes. The "
        "line on a bar is where the share of ID images of this class lies with a probability of "
        "95% (Beta distribution); the share of a few images scatters more."
    ]
    if pooled := calibration.pooled:
        text.append(
            f"{len(pooled)} of {len(names)} classes have fewer than {calibration.least} "
            f"calibration images and are compared with {len(calibration.cells[-1]):,} of "
            f"{'such' if calibration.is_pooled else 'all'} classes: nothing is promised for one "
            "of them alone."
        )
    figure = charts.shares("Accepted share by predicted class", rows, asked)
    return Section("Acceptance by class", tuple(text), figures=(figure,))


def threshold(calibration: Values | None, acceptance: float) -> float | None:
    """The smallest confidence that is accepted at an acceptance, None without enough images."""
    if calibration is None or len(calibration) < needed_images(acceptance):
        return None
    k = math.floor((1 - acceptance + EQUAL) * (len(calibration) + 1))
    return float(np.sort(calibration)[k - 1])


def contributions_section(
    experts: Sequence[str], counts: Mapping[str, Mapping[str, int]]
) -> list[Section]:
    """How often each expert contributes least to rejected images; none without such images."""
    totals = {group: n for group, count in counts.items() if (n := sum(count.values()))}
    if not totals:
        return []
    percent = {
        group: {name: 100 * counts[group].get(name, 0) / n for name in experts}
        for group, n in totals.items()
    }
    numbers = ", ".join(f"{n:,} {group}" for group, n in totals.items())
    text = (
        f"For each rejected image ({numbers}), the expert whose contribution to the confidence is "
        "furthest below its mean over ID images. Layers are in the network's order."
    )
    figure = charts.bars("Expert with the lowest contribution", percent, "% of the rejected images")
    return [Section("Contributions of layers", (text,), figures=(figure,))]


def detector_facts(detector: Detector) -> Facts:
    """What a detector and its network are."""
    network = type(unwrapped(detector.net)).__name__
    facts = [("detector", type(detector).__name__), ("network", network)]
    if isinstance(detector, FuseNorm):
        default = asdict(Settings())
        changed = {k: v for k, v in asdict(detector.settings).items() if v != default[k]}
        weak = [name for name in detector.experts if name not in detector.strong]
        fitted = detector.id_statistics_
        strong = [*detector.strong] if fitted is None else fitted.weighted
        facts += [
            ("settings", ", ".join(f"{k} = {v}" for k, v in changed.items()) or "default"),
            ("strong experts", ", ".join(strong)),
            ("other blocks", ", ".join(weak) or "none"),
        ]
        if fitted is not None:
            facts.append(("fitted on", f"{fitted.id_scores.shape[1]:,} ID images"))
        if detector.calibration_ is not None:
            facts.append(("ID images", str(detector.calibration_)))
    return tuple(facts)


def table_of(
    frame: pd.DataFrame, caption: str, corner: str, best: Mapping[Any, bool] = {}
) -> Table:
    """A table of a data frame; `best`: columns of numbers whose best cell is marked, True = max."""
    rows = tuple(
        (_name(name), *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row))
        for name, row in zip(frame.index, frame.to_numpy(), strict=True)
    )
    marked = set()
    for number, column in enumerate(frame.columns, start=1):
        if column in best:
            values = frame[column].to_numpy(float).round(2)
            top = values.max() if best[column] else values.min()
            marked |= {(int(row), number) for row in np.flatnonzero(values == top)}
    columns = (corner, *map(_name, frame.columns))
    return Table(caption, columns, rows, frozenset(map(_name, GROUPS)), frozenset(marked))


def _name(name: Any) -> str:
    """The title of a row or a column; a group's has its mean."""
    if name in GROUPS:
        return f"{GROUPS[name]} mean"
    first, *rest = str(name).split(" ")
    return " ".join((GROUPS.get(first, first), *rest))
