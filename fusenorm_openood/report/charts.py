"""The charts of a report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics

from fusenorm_openood.method.conformal import EQUAL, guarantee, rejects
from fusenorm_openood.report.page import BLUE, GRID, INK, LINES, SIZE, SOFT, Figure, drawn, legend

BINS, POINTS = 40, 150
MARKS = ("v", "D", "^")

Values = NDArray[Any]


class Series(NamedTuple):
    """Values `[N]` of some images, and what the images are."""

    label: str
    values: Values


def histogram(
    title: str,
    known: Series,
    others: Sequence[Series],
    axis: str,
    threshold: float | None = None,
    marks: Sequence[Series] = (),
    lines: tuple[str, ...] = (),
) -> Figure:
    """How scores of ID images and of others are distributed; `marks` are single images."""
    edges = bin_edges(known.values, [s.values for s in (*others, *marks)])

    def shares(values: Values) -> Values:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        return 100 * counts / max(len(values), 1)

    def draw(ax: Any) -> None:
        ax.stairs(shares(known.values), edges, fill=True, color=BLUE, alpha=0.3)
        ax.stairs(shares(known.values), edges, color=BLUE, label=known.label, linewidth=1.2)
        for series, (colour, line) in zip(others, LINES, strict=False):
            style = {"color": colour, "linestyle": line, "linewidth": 1.6}
            ax.stairs(shares(series.values), edges, label=series.label, **style)
        top = ax.get_ylim()[1]
        for row, (series, (colour, _)) in enumerate(zip(marks, LINES, strict=False)):
            x = np.clip(series.values, edges[0], edges[-1])
            y = np.full(len(x), top * (1.05 + 0.09 * row))
            ax.plot(x, y, MARKS[row], color=colour, markersize=4.5, label=series.label)
        if threshold is not None and edges[0] <= threshold <= edges[-1]:
            ax.axvline(threshold, color=INK, linestyle=(0, (1, 1.5)), label="threshold")
        ax.set_ylim(0, top * (1.05 + 0.09 * len(marks)))
        ax.set_xlabel(axis)
        ax.set_ylabel("% of the images")
        ax.locator_params(axis="x", nbins=6)
        legend(ax)

    spread = "; ".join(
        f"{s.label}: median {np.median(s.values):.3g}, 90% between "
        f"{np.percentile(s.values, 5):.3g} and {np.percentile(s.values, 95):.3g}"
        for s in (known, *others, *marks)
        if len(s.values)
    )
    return drawn(title, f"Histogram. {spread}.", draw, lines=lines)


def bin_edges(known: Values, others: Sequence[Values]) -> Values:
    """Edges of bins that show ID images in detail, however far away some others are."""
    low, high = np.percentile(known, [1, 99])
    span = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    every = np.concatenate([known, *others])
    first = max(np.percentile(every, 0.5), low - 2.5 * span)
    last = min(np.percentile(every, 99.5), high + 2.5 * span)
    edges: Values = np.linspace(min(first, low), max(last, low + span), BINS + 1)
    return edges


def mean_roc(known: Values, others: Sequence[Values]) -> tuple[Values, Values]:
    """False and mean true positive rates over data sets, OOD as the positive class.

    At no more than `POINTS` points; the area below is the mean of the AUROCs.
    """
    fpr = np.linspace(0, 1, POINTS) ** 2  # most of them where curves are steep
    each = []
    for values in others:
        is_ood = np.repeat([0, 1], [len(known), len(values)])
        x, y, _ = metrics.roc_curve(is_ood, -np.concatenate([known, values]))
        each.append(np.interp(fpr, x, y))
    return np.append(0.0, fpr), np.append(0.0, np.mean(each, axis=0))


def roc(title: str, curves: Mapping[str, tuple[Values, Values]], shown: int = 4) -> Figure:
    """ROC curves, the best first: the first has a line of its own, those after `shown` are grey."""

    def draw(ax: Any) -> None:
        ax.plot([0, 100], [0, 100], color=GRID, linewidth=1)
        styles = [(BLUE, "-", 2.2), *((colour, line, 1.4) for colour, line in LINES)][:shown]
        rest = list(curves)[shown:]
        for number, name in enumerate(rest):
            label = f"{len(rest)} more" if number == 0 else None
            ax.plot(*_percent(curves[name]), color="#a6a6a6", linewidth=0.7, label=label)
        for name, (colour, line, width) in reversed(list(zip(curves, styles, strict=False))):
            ax.plot(
                *_percent(curves[name]), color=colour, linestyle=line, linewidth=width, label=name
            )
        ax.set_xlabel("% of ID images rejected")
        ax.set_ylabel("% of OOD images rejected")
        ax.grid()
        ax.set(xlim=(-1, 100), ylim=(0, 101))
        legend(ax, backwards=True)

    return drawn(title, f"ROC curves: {'; '.join(curves)}.", draw, (SIZE[0], 3.5))


def acceptance_curves(
    title: str,
    images: int,
    known: Series | None,
    others: Sequence[Series],
    asked: float | None = None,
) -> Figure:
    """What becomes of images at each acceptance, from their p-values.

    Args:
        title: title of the figure.
        images: number of calibration images, which the guarantee depends on.
        known: p-values of ID images; the share that is accepted is shown.
        others: p-values of others; the share that is rejected is shown.
        asked: the acceptance that was chosen.
    """
    x = np.linspace(0.5, images / (images + 1) - EQUAL, 80)
    promised = [guarantee(images, float(a)) for a in x]
    low, high = (np.array([getattr(g, end) for g in promised]) for end in ("low", "high"))
    uniform = promised[0].uniform

    def rejected(values: Values) -> Values:
        return np.array([100 * rejects(values, float(a)).mean() for a in x])

    def draw(ax: Any) -> None:
        label = "ID accepted, 95%"
        ax.fill_between(100 * x, 100 * low, 100 * high, color=BLUE, alpha=0.25, lw=0, label=label)
        style = {"color": BLUE, "linewidth": 0.8, "linestyle": (0, (1, 2))}
        ax.plot(100 * x, 100 * np.clip(x - uniform, 0, 1), label="… all at once", **style)
        ax.plot(100 * x, 100 * np.clip(x + uniform, 0, 1), **style)
        if known is not None:
            ax.plot(100 * x, 100 - rejected(known.values), color=BLUE, label=known.label)
        for series, (colour, line) in zip(others, LINES, strict=False):
            ax.plot(
                100 * x, rejected(series.values), color=colour, linestyle=line, label=series.label
            )
        if asked is not None:
            ax.axvline(100 * asked, color=SOFT, linestyle=(0, (1, 1.5)), linewidth=1)
        ax.set(xlim=(50, 100), ylim=(0, 102))
        ax.set_xlabel("acceptance asked for, %")
        ax.set_ylabel("% of the images")
        ax.grid()
        legend(ax)

    at = float(x[np.argmin(np.abs(x - (asked or 0.95)))])
    said = [f"at an acceptance of {at:.1%}"]
    if known is not None:
        said.append(f"{1 - rejects(known.values, at).mean():.1%} {known.label}")
    said += [f"{rejects(s.values, at).mean():.1%} {s.label}" for s in others]
    return drawn(title, f"Line chart: {', '.join(said)}.", draw, (SIZE[0], 3.5))


def _percent(curve: tuple[Values, Values]) -> tuple[Values, Values]:
    return 100 * curve[0], 100 * curve[1]


def bars(title: str, groups: Mapping[str, Mapping[str, float]], axis: str) -> Figure:
    """Horizontal bars in percent, for each name one per group."""
    names = list(dict.fromkeys(name for shares in groups.values() for name in shares))
    hatches = ("", "////", "....")

    def draw(ax: Any) -> None:
        height = 0.8 / len(groups)
        colours = [colour for colour, _ in LINES]
        for number, (group, shares) in enumerate(groups.items()):
            y = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * height
            values = [shares.get(name, 0.0) for name in names]
            style = {"color": colours[number], "hatch": hatches[number], "edgecolor": "white"}
            drawing = ax.barh(y, values, height * 0.92, label=group, linewidth=0, **style)
            shown = [f"{v:.0f}" if v >= 0.5 else "" for v in values]
            ax.bar_label(drawing, shown, padding=2, fontsize=7.5)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.invert_yaxis()
        ax.set_xlabel(axis)
        ax.margins(x=0.1)
        legend(ax)

    listed = "; ".join(
        f"{group}: {', '.join(f'{name} {share:.0f}%' for name, share in shares.items())}"
        for group, shares in groups.items()
    )
    rows = len(names) * len(groups)
    return drawn(
        title, f"Bar chart. {listed}.", draw, (SIZE[0], 0.9 + 0.13 * rows + 0.08 * len(names))
    )


def dots(title: str, groups: Mapping[str, Mapping[str, float]], axis: str) -> Figure:
    """One line per name, one dot per group."""
    names = list(next(iter(groups.values())))

    def draw(ax: Any) -> None:
        for (group, values), (colour, _), mark in zip(
            groups.items(), LINES, ("o", "s", "D"), strict=False
        ):
            x = [values[name] for name in names]
            ax.plot(x, range(len(names)), mark, color=colour, markersize=4.5, label=group)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8)
        ax.invert_yaxis()
        ax.set_xlabel(axis)
        ax.grid()
        legend(ax)

    best = "; ".join(f"{g}: best {max(v, key=v.__getitem__)}" for g, v in groups.items())
    return drawn(title, f"Dot chart. {best}.", draw, (SIZE[0], 1.0 + 0.17 * len(names)))
