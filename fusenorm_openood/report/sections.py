"""Sections that several reports share, and the facts about a detector."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import CalibrationError
from fusenorm_openood.method import conformal, metrics
from fusenorm_openood.method.calibration import Calibration
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import unwrapped
from fusenorm_openood.report import plots
from fusenorm_openood.report.page import SIZE, SMALL, Facts, Figure, Section, Table

Values = NDArray[np.float64]

GROUPS = {"nearood": "near-OOD", "farood": "far-OOD", "valood": "validation OOD"}
HEAT = "a heat map of the energy that a block's norm comes from (dark blue = none, yellow = most)"
OPEN = 3  # small multiples that are not folded
KEY = (SIZE[0], 0.45)
ENDS = "The outermost bins also hold all images beyond them."
READ = (
    f"Larger = more in-distribution. {ENDS} AUROC and FPR@95 in percent, with OOD as the positive "
    "class, are means over the data sets, as in the table; ROC curves are such means too."
)


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
        each = [metrics.ood_metrics(self.ids, values) for values in self.ood[group].values()]
        return tuple(100 * np.mean([(m.auroc, m.fpr95) for m in each], axis=0))

    def counts(self) -> Facts:
        """The numbers of images."""
        groups = ((f"{GROUPS[g]} images", f"{len(self.pooled(g)):,}") for g in self.ood)
        return (("ID images", f"{len(self.ids):,}"), *groups)


def histogram(score: Score, cut: float | None = None) -> Figure:
    """The distribution of a score, ID against OOD; `cut` is its threshold."""
    lines = tuple(
        "{} AUROC {:.2f}, FPR@95 {:.2f}".format(GROUPS[group], *score.figures(group))
        for group in score.ood
    )
    scores = {"ID": score.ids, **{GROUPS[group]: score.pooled(group) for group in score.ood}}
    draw = partial(plots.histograms, scores, threshold=cut)
    return Figure(score.name, draw, lines=lines)


def roc_figures(scores: Sequence[Score]) -> tuple[Figure, ...]:
    """ROC curves of the first score and of the others, the best of which are named."""
    figures = []
    for group in scores[0].ood:
        curves = {s.name: (s.ids, list(s.ood[group].values())) for s in scores}
        title = f"ROC curves, {GROUPS[group]} (AUROC in percent)"
        figures.append(Figure(title, partial(plots.roc, curves), (SIZE[0], 3.3)))
    return tuple(figures)


def acceptance_figures(
    images: int, ids: Mapping[str, Values], others: Mapping[str, Values], asked: float
) -> tuple[Figure, Figure]:
    """The accepted share of ID images beside the rejected share of others, from p-values."""
    accepted = partial(plots.acceptance, ids, images, asked=asked)
    rejected = partial(plots.rejection, others, images, asked=asked)
    title = f"Rejected: {' and '.join(others)} images"
    return Figure("Accepted: ID images", accepted), Figure(title, rejected)


def promised(images: int, asked: float) -> tuple[str, str]:
    """What is promised about acceptance, in sentences."""
    return (
        f"At an acceptance of {asked:.0%}, {conformal.guarantee(images, asked)}.",
        "The band is where the accepted share of ID images lies with a probability of 95% (Beta "
        "distribution); between the dotted lines it lies at all acceptances at once (Dvoretzky, "
        "Kiefer, Wolfowitz). Both hold for ID images like the calibration images.",
    )


def multiples(
    section: Section, figures: Mapping[str, Figure], groups: Mapping[str, Sequence[str]]
) -> Section:
    """A section with small multiples under one legend: the first of them, the others folded."""
    first = list(figures)[:OPEN]
    shown = (figures[name]._replace(legend="none") for name in first)
    key = next(iter(figures.values()))._replace(title="Legend", size=KEY, legend="alone", lines=())
    folded = []
    for title, names in groups.items():
        rest = [figures[n]._replace(size=SMALL, legend="none") for n in names if n not in first]
        folded += [(f"{title} ({len(rest)})", tuple(rest))] if rest else []
    figs = (*section.figures, *shown)
    return section._replace(figures=figs, key=key, folded=tuple(folded))


def why_section(
    detector: FuseNorm,
    objected: Mapping[str, Mapping[str, int]],
    figures: Mapping[str, Figure],
    text: str,
) -> Section:
    """The experts that contribute least to rejected images, and the scores of all experts.

    `objected` says by group of rejected images how often each expert contributes least, `text`
    what the figures, the distribution of every expert's scores, show.
    """
    counts = {group: count for group, count in objected.items() if sum(count.values())}
    total = sum(map(Counter, counts.values()), Counter[str]())
    said, lead = text, tuple[Figure, ...]()
    if counts:
        name, most = total.most_common(1)[0]
        numbers = ", ".join(f"{sum(count.values()):,} {group}" for group, count in counts.items())
        said = (
            f"For each rejected image ({numbers}), the expert whose contribution to the confidence "
            f"is furthest below its mean over ID images. {text}"
        )
        title = f"Lowest contribution: {name}, in {most / total.total():.0%} of the rejected images"
        lead = (Figure(title, partial(plots.contributions, counts)),)
    order = sorted(figures, key=lambda name: (-total[name], name not in detector.strong))
    section = Section("Why images are rejected", (said,), figures=lead)
    layers = detector.id_statistics_.layers if detector.id_statistics_ else ()
    others = [name for name in detector.experts if name not in layers]
    ordered = {name: figures[name] for name in order}
    return multiples(section, ordered, {"Layers": layers, "Other experts": others})


def groups_section(
    calibration: Calibration,
    names: Sequence[str],
    group: NDArray[np.int64],
    accepted: NDArray[np.bool_],
    asked: float,
) -> Section:
    """The accepted share of the scored images `[N]` of each predicted class, the smallest first."""

    def promise(number: int) -> conformal.Guarantee | None:
        try:
            return calibration.guarantee(asked, group=number)
        except CalibrationError:
            return None

    shares = sorted((float(accepted[group == g].mean()), int(g)) for g in np.unique(group))
    rows = [(names[g], share, promise(g)) for share, g in shares[: plots.MOST]]
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
    size = (SIZE[0], 0.9 + 0.17 * len(rows))
    draw = partial(plots.bars, rows, asked=asked)
    figure = Figure("Accepted share by predicted class", draw, size)
    return Section("Acceptance by class", tuple(text), figures=(figure,))


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
