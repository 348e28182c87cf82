"""The charts of a report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics

from fusenorm_openood.method.conformal import EQUAL, Guarantee, guarantee, rejects
from fusenorm_openood.report.page import SIZE, Figure

# Okabe and Ito's colours, each with a line style, hatch and mark of its own: never colour alone.
INK, SOFT, GRID, BLUE = "#1a1a1a", "#595959", "#d0d0d0", "#0072B2"
LINES = (("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
HATCHES, DOTS, MARKS = ("", "////", "...."), ("o", "s", "D"), ("v", "D", "^")
DOTTED = (0, (1, 1.5))
BINS, POINTS = 40, 150
MOST = 40  # classes in a chart

Values = NDArray[Any]


class Series(NamedTuple):
    """Values `[N]` of some images, and what the images are."""

    label: str
    values: Values


def legend(ax: Any, backwards: bool = False) -> None:
    """A legend below the axes, where it hides nothing, in as many columns as fit."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        step = -1 if backwards else 1
        columns = int(72 * SIZE[0] // (42 + 4.8 * max(map(len, labels))))
        where: Any = {"loc": "outside lower center", "ncols": min(max(columns, 1), len(labels))}
        ax.figure.legend(handles[::step], labels[::step], columnspacing=1.2, **where)


def histogram(
    title: str,
    ids: Series,
    others: Sequence[Series],
    axis: str,
    threshold: float | None = None,
    marks: Sequence[Series] = (),
    lines: tuple[str, ...] = (),
) -> Figure:
    """The distribution of scores of ID images and of others; `marks` are single images."""
    edges = bin_edges(ids.values, [s.values for s in (*others, *marks)])

    def stairs(ax: Any, values: Values, **style: Any) -> None:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        ax.stairs(100 * counts / max(len(values), 1), edges, **style)

    def draw(ax: Any) -> None:
        stairs(ax, ids.values, fill=True, color=BLUE, alpha=0.3)
        stairs(ax, ids.values, color=BLUE, label=ids.label, linewidth=1.2)
        for (label, values), (colour, line) in zip(others, LINES, strict=False):
            stairs(ax, values, color=colour, linestyle=line, label=label, linewidth=1.6)
        top = ax.get_ylim()[1]
        for row, ((label, values), (colour, _)) in enumerate(zip(marks, LINES, strict=False)):
            x = np.clip(values, edges[0], edges[-1])
            y = np.full(len(x), top * (1.05 + 0.09 * row))
            ax.plot(x, y, MARKS[row], color=colour, markersize=4.5, label=label)
        if threshold is not None and edges[0] <= threshold <= edges[-1]:
            ax.axvline(threshold, color=INK, linestyle=DOTTED, label="threshold")
        ax.set(xlabel=axis, ylabel="% of the images", ylim=(0, top * (1.05 + 0.09 * len(marks))))
        ax.locator_params(axis="x", nbins=6)
        legend(ax)

    spread = "; ".join(
        "{}: median {:.3g}, 90% between {:.3g} and {:.3g}".format(
            s.label, *np.percentile(s.values, [50, 5, 95])
        )
        for s in (ids, *others, *marks)
        if len(s.values)
    )
    return Figure(title, f"Histogram. {spread}.", draw, lines=lines)


def bin_edges(ids: Values, others: Sequence[Values]) -> Values:
    """Edges of bins that show ID images in detail, however far away some others are."""
    low, high = np.percentile(ids, [1, 99])
    span = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    every = np.concatenate([ids, *others])
    first = max(np.percentile(every, 0.5), low - 2.5 * span)
    last = min(np.percentile(every, 99.5), high + 2.5 * span)
    edges: Values = np.linspace(min(first, low), max(last, low + span), BINS + 1)
    return edges


def mean_roc(ids: Values, others: Sequence[Values]) -> tuple[Values, Values]:
    """False and mean true positive rates over data sets, whose area is the mean of the AUROCs."""
    fpr = np.linspace(0, 1, POINTS) ** 2  # most of them where curves are steep
    curves = []
    for values in others:
        is_ood = np.repeat([0, 1], [len(ids), len(values)])
        x, y, _ = metrics.roc_curve(is_ood, -np.concatenate([ids, values]))
        curves.append(np.interp(fpr, x, y))
    return np.append(0.0, fpr), np.append(0.0, np.mean(curves, axis=0))


def roc(title: str, curves: Mapping[str, tuple[Values, Values]], shown: int = 4) -> Figure:
    """ROC curves, the best first: the first has a line of its own, those after `shown` are grey."""

    def draw(ax: Any) -> None:
        def curve(name: str, **style: Any) -> None:
            ax.plot(*(100 * rate for rate in curves[name]), **style)

        ax.plot([0, 100], [0, 100], color=GRID, linewidth=1)
        rest = list(curves)[shown:]
        for number, name in enumerate(rest):
            label = f"{len(rest)} more" if number == 0 else None
            curve(name, color="#a6a6a6", linewidth=0.7, label=label)
        styles = [(BLUE, "-", 2.2), *((colour, line, 1.4) for colour, line in LINES)][:shown]
        for name, (colour, line, width) in reversed(list(zip(curves, styles, strict=False))):
            curve(name, color=colour, linestyle=line, linewidth=width, label=name)
        ax.set(xlabel="% of ID images rejected", ylabel="% of OOD images rejected")
        ax.set(xlim=(-1, 100), ylim=(0, 101))
        ax.grid()
        legend(ax, backwards=True)

    return Figure(title, f"ROC curves: {'; '.join(curves)}.", draw, (SIZE[0], 3.5))


def acceptance_curves(
    title: str, images: int, ids: Series | None, others: Sequence[Series], asked: float
) -> Figure:
    """The accepted share of ID images and the rejected share of others at each acceptance.

    `images` is the number of calibration images, which the guarantee depends on; the series are
    p-values; `asked` is the acceptance that was chosen.
    """
    x = np.linspace(0.5, images / (images + 1) - EQUAL, 80)
    promised = [guarantee(images, float(a)) for a in x]
    uniform = promised[0].uniform

    def rejected(series: Series) -> Values:
        return np.array([100 * rejects(series.values, float(a)).mean() for a in x])

    def draw(ax: Any) -> None:
        band = {"color": BLUE, "alpha": 0.25, "lw": 0, "label": "ID accepted, 95%"}
        ax.fill_between(
            100 * x, [100 * g.low for g in promised], [100 * g.high for g in promised], **band
        )
        style = {"color": BLUE, "linewidth": 0.8, "linestyle": (0, (1, 2))}
        ax.plot(100 * x, 100 * np.clip(x - uniform, 0, 1), label="… all at once", **style)
        ax.plot(100 * x, 100 * np.clip(x + uniform, 0, 1), **style)
        if ids is not None:
            ax.plot(100 * x, 100 - rejected(ids), color=BLUE, label=ids.label)
        for series, (colour, line) in zip(others, LINES, strict=False):
            ax.plot(100 * x, rejected(series), color=colour, linestyle=line, label=series.label)
        ax.axvline(100 * asked, color=SOFT, linestyle=DOTTED, linewidth=1)
        ax.set(xlabel="acceptance asked for, %", ylabel="% of the images")
        ax.set(xlim=(50, 100), ylim=(0, 102))
        ax.grid()
        legend(ax)

    at = float(x[np.argmin(np.abs(x - asked))])
    text = [f"at an acceptance of {at:.1%}"]
    if ids is not None:
        text.append(f"{1 - rejects(ids.values, at).mean():.1%} {ids.label}")
    text += [f"{rejects(s.values, at).mean():.1%} {s.label}" for s in others]
    return Figure(title, f"Line chart: {', '.join(text)}.", draw, (SIZE[0], 3.5))


def bars(title: str, groups: Mapping[str, Mapping[str, float]], axis: str) -> Figure:
    """Horizontal bars in percent, for each name one per group."""
    names = list(dict.fromkeys(name for percent in groups.values() for name in percent))

    def draw(ax: Any) -> None:
        height = 0.8 / len(groups)
        for number, (group, percent) in enumerate(groups.items()):
            y = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * height
            values = [percent.get(name, 0.0) for name in names]
            style = {"color": LINES[number][0], "hatch": HATCHES[number], "edgecolor": "white"}
            drawing = ax.barh(y, values, height * 0.92, label=group, linewidth=0, **style)
            numbers = [f"{v:.0f}" if v >= 0.5 else "" for v in values]
            ax.bar_label(drawing, numbers, padding=2, fontsize=7.5)
        _name_rows(ax, names, axis)
        ax.margins(x=0.1)
        legend(ax)

    listed = "; ".join(
        f"{group}: {', '.join(f'{name} {value:.0f}%' for name, value in percent.items())}"
        for group, percent in groups.items()
    )
    height = 0.9 + 0.13 * len(names) * len(groups) + 0.08 * len(names)
    return Figure(title, f"Bar chart. {listed}.", draw, (SIZE[0], height))


def shares(title: str, rows: Sequence[tuple[str, float, Guarantee | None]], asked: float) -> Figure:
    """Horizontal bars of accepted shares, and on them the intervals that are promised."""
    names = [name for name, *_ in rows]

    def draw(ax: Any) -> None:
        ax.barh(range(len(rows)), [100 * share for _, share, _ in rows], 0.7, color=BLUE, alpha=0.4)
        for row, (_, _, promised) in enumerate(rows):
            if promised is not None:
                ends = 100 * promised.low, 100 * promised.high
                ax.plot(ends, (row, row), color=INK, linewidth=1.6, marker="|", markersize=5)
        ax.axvline(100 * asked, color=SOFT, linestyle=DOTTED, linewidth=1)
        _name_rows(ax, names, "% accepted")
        ax.set_xlim(0, 101)

    listed = ", ".join(f"{name} {share:.0%}" for name, share, _ in rows)
    return Figure(title, f"Bar chart: {listed}.", draw, (SIZE[0], 0.9 + 0.17 * len(names)))


def dots(title: str, groups: Mapping[str, Mapping[str, float]], axis: str) -> Figure:
    """One line per name, one dot per group."""
    names = list(next(iter(groups.values())))

    def draw(ax: Any) -> None:
        for number, (group, values) in enumerate(groups.items()):
            style = {"color": LINES[number][0], "markersize": 4.5, "label": group}
            ax.plot([values[name] for name in names], range(len(names)), DOTS[number], **style)
        _name_rows(ax, names, axis)
        ax.tick_params(axis="y", labelsize=8)
        ax.grid()
        legend(ax)

    best = "; ".join(f"{g}: best {max(v, key=v.__getitem__)}" for g, v in groups.items())
    return Figure(title, f"Dot chart. {best}.", draw, (SIZE[0], 1.0 + 0.17 * len(names)))


def _name_rows(ax: Any, names: Sequence[str], axis: str) -> None:
    """The first name at the top, and the label of the other axis."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.invert_yaxis()
    ax.set_xlabel(axis)
