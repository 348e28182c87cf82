"""Drawings of results on matplotlib's axes; reports consist of them.

Every function returns what its drawing shows in words, for an alternative text. Legends are left to
`ax.legend()`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn import metrics
from torch import Tensor

from fusenorm_openood.detectors.statistics import Explanation
from fusenorm_openood.errors import DataError
from fusenorm_openood.method.conformal import EQUAL, Guarantee, guarantee, rejects
from fusenorm_openood.method.metrics import ood_metrics

# Okabe and Ito's colours and a brown, each with a line style, hatch and mark of its own: never
# colour alone.
INK, SOFT, GRID, BLUE = "#1a1a1a", "#595959", "#d0d0d0", "#0072b2"
LINES = (
    ("#d55e00", "--"),
    ("#009e73", "-."),
    ("#cc79a7", ":"),
    ("#e69f00", (0, (7, 1))),
    ("#56b4e9", (0, (4, 1, 1, 1, 1, 1))),
    ("#7f4f24", (0, (1, 0.7))),
)
HATCHES = ("", "////", "....", "xxxx", "----", "||||")
DOTS, MARKS = ("o", "s", "D", "^", "v", "P"), ("v", "D", "^", "o", "s", "P")
DOTTED = (0, (1, 1.5))
BINS, POINTS = 40, 150
MANY = len(LINES)  # data sets that are told apart, CIFAR-10's in OpenOOD
MOST = 40  # classes in a chart
FEW = 64  # pixels of the longer side up to which a picture loses nothing

Values = NDArray[Any]


def histograms(
    scores: Mapping[str, Values],
    ax: Any,
    threshold: float | None = None,
    marks: Mapping[str, Values] = {},
) -> str:
    """The distribution of a score on ID images and on other images.

    Args:
        scores: by label, scores `[N]`, larger = more in-distribution; those of ID images first.
        ax: matplotlib's axes.
        threshold: where rejection ends, if it is to be shown.
        marks: by label, scores of single images, drawn as marks above the distributions.

    Raises:
        DataError: nothing to draw, here and in `roc` and `contributions`.

    Examples:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> histograms({"ID": np.arange(5.0), "OOD": np.zeros(5)}, Figure().subplots())
        'Histogram. ID: median 2, 90% between 0.2 and 3.8; OOD: median 0, 90% between 0 and 0.'
    """
    _check_any(scores)
    (label, ids), *others = scores.items()
    edges = bin_edges(ids, [values for _, values in (*others, *marks.items())])

    def stairs(values: Values, **style: Any) -> None:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        ax.stairs(100 * counts / max(len(values), 1), edges, **style)

    stairs(ids, fill=True, color=BLUE, alpha=0.3)
    stairs(ids, color=BLUE, label=label, linewidth=1.2)
    for (label, values), (colour, line) in zip(others, cycle(LINES), strict=False):
        stairs(values, color=colour, linestyle=line, label=label, linewidth=1.6)
    top = ax.get_ylim()[1]
    for row, (label, values) in enumerate(marks.items()):
        x, y = np.clip(values, edges[0], edges[-1]), top * (1.05 + 0.09 * row)
        style = {"color": LINES[row % MANY][0], "markersize": 4.5, "label": label}
        ax.plot(x, np.full(len(x), y), MARKS[row % MANY], **style)
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        ax.axvline(threshold, color=INK, linestyle=DOTTED, label="threshold")
    ax.set(xlabel="score", ylabel="% of the images", ylim=(0, top * (1.05 + 0.09 * len(marks))))
    ax.locator_params(axis="x", nbins=6)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")  # no factor beside the axis
    return "Histogram. {}.".format(
        "; ".join(
            "{}: median {:.3g}, 90% between {:.3g} and {:.3g}".format(
                label, *np.percentile(values, [50, 5, 95])
            )
            for label, values in (*scores.items(), *marks.items())
            if len(values)
        )
    )


def _check_any(given: Mapping[str, object]) -> None:
    if not given:
        raise DataError("there is nothing to draw, got an empty mapping: give values by label")


def bin_edges(ids: Values, others: Sequence[Values]) -> Values:
    """Edges of bins that show ID images in detail, however far away some others are."""
    low, high = np.percentile(ids, [1, 99])
    span = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    every = np.concatenate([ids, *others])
    first = max(np.percentile(every, 0.5), low - 2.5 * span)
    last = min(np.percentile(every, 99.5), high + 2.5 * span)
    return np.linspace(min(first, low), max(last, low + span), BINS + 1)


def roc(scores: Mapping[str, tuple[Values, Sequence[Values]]], ax: Any, shown: int = 4) -> str:
    """ROC curves, means over data sets, with AUROC in percent; OOD is the positive class.

    Args:
        scores: by method, scores `[N]` of ID images and those of each OOD data set, larger = more
            in-distribution. The first method has a line of its own, the others follow by AUROC.
        ax: matplotlib's axes.
        shown: number of methods that are named; the others are grey.

    Examples:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> roc({"energy": (np.array([2.0, 3, 4]), [np.zeros(9)])}, Figure().subplots())
        'ROC curves: energy (100.00).'
    """
    _check_any(scores)
    auroc = {
        name: 100 * float(np.mean([ood_metrics(ids, values).auroc for values in others]))
        for name, (ids, others) in scores.items()
    }
    first, *rest = scores
    order = [first, *sorted(rest, key=lambda name: -auroc[name])]
    labels = [f"{name} ({auroc[name]:.2f})" for name in order]
    ax.plot([0, 100], [0, 100], color=GRID, linewidth=1)
    styles = [(BLUE, "-", 2.2), *((colour, line, 1.4) for colour, line in LINES)][:shown]
    for number, (name, label) in enumerate(zip(order, labels, strict=True)):
        style: dict[str, Any] = {"color": "#a6a6a6", "linewidth": 0.7, "zorder": 2}
        if number < len(styles):
            colour, line, width = styles[number]
            style |= {"color": colour, "linestyle": line, "linewidth": width, "label": label}
            style["zorder"] = 3 - number / 10
        elif number == len(styles):
            style["label"] = f"{len(order) - number} more"
        ax.plot(*(100 * rate for rate in mean_roc(*scores[name])), **style)
    ax.set(xlabel="% of ID images rejected", ylabel="% of OOD images rejected")
    ax.set(xlim=(-1, 100), ylim=(0, 101))
    ax.grid(True)
    return f"ROC curves: {'; '.join(labels)}."


def mean_roc(ids: Values, others: Sequence[Values]) -> tuple[Values, Values]:
    """False and mean true positive rates over data sets, whose area is the mean of the AUROCs."""
    fpr = np.linspace(0, 1, POINTS) ** 2  # most of them where curves are steep
    curves = []
    for values in others:
        is_ood = np.repeat([0, 1], [len(ids), len(values)])
        x, y, _ = metrics.roc_curve(is_ood, -np.concatenate([ids, values]))
        curves.append(np.interp(fpr, x, y))
    return np.append(0.0, fpr), np.append(0.0, np.mean(curves, axis=0))


def acceptance(p_values: Mapping[str, Values], images: int, ax: Any, asked: float = 0.95) -> str:
    """The accepted share of ID images at each acceptance, and where it is promised to lie.

    Args:
        p_values: by label, conformal p-values `[N]` of ID images; none = the promise alone.
        images: number of calibration images, on which the promise depends.
        ax: matplotlib's axes.
        asked: the acceptance that was chosen.
    """
    x = _acceptances(images)
    promised = [guarantee(images, float(a)) for a in x]
    low, high = ([100 * getattr(g, end) for g in promised] for end in ("low", "high"))
    ax.fill_between(100 * x, low, high, color=BLUE, alpha=0.25, lw=0, label="promised, 95%")
    style: dict[str, Any] = {"color": BLUE, "linewidth": 0.8, "linestyle": (0, (1, 2))}
    for sign, label in ((-1, "… at all at once"), (1, None)):
        ax.plot(100 * x, 100 * np.clip(x + sign * promised[0].uniform, 0, 1), label=label, **style)
    text = _shares(p_values, x, ax, asked, False, [(BLUE, "-")])
    ax.set(ylabel="% of ID images accepted", ylim=(40, 101))
    return text


def rejection(p_values: Mapping[str, Values], images: int, ax: Any, asked: float = 0.95) -> str:
    """The rejected share of images that may be OOD at each acceptance; see `acceptance`."""
    text = _shares(p_values, _acceptances(images), ax, asked, True, LINES)
    ax.set(ylabel="% of the images rejected", ylim=(0, 101))
    return text


def _acceptances(images: int) -> Values:
    return np.linspace(0.5, images / (images + 1) - EQUAL, 80)


def _shares(
    p_values: Mapping[str, Values],
    x: Values,
    ax: Any,
    asked: float,
    is_rejected: bool,
    styles: Sequence[tuple[str, object]],
) -> str:
    """Curves of the rejected or accepted shares at acceptances `x`."""
    at, said = int(np.argmin(np.abs(x - asked))), []
    for (label, p), (colour, line) in zip(p_values.items(), cycle(styles), strict=False):
        rejected = np.array([rejects(p, float(a)).mean() for a in x])
        share = 100 * (rejected if is_rejected else 1 - rejected)
        ax.plot(100 * x, share, color=colour, linestyle=line, label=label)
        said.append(f", {share[at]:.1f}% of {label}")
    ax.axvline(100 * asked, color=SOFT, linestyle=DOTTED, linewidth=1)
    ax.set(xlabel="acceptance asked for, %", xlim=(50, 100))
    ax.grid(True)
    verb = "rejected" if is_rejected else "accepted"
    return (
        f"Line chart of the share that is {verb}, at an acceptance of {x[at]:.1%}{''.join(said)}."
    )


def contributions(objected: Mapping[str, Iterable[str]], ax: Any, most: int = 8) -> str:
    """How often each expert contributes least to images, the most frequent experts first.

    Args:
        objected: by label of the images, the expert of each; see `Explanation.objected`.
        ax: matplotlib's axes.
        most: number of experts that are named.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> contributions({"rejected": ["mds", "mds", "energy", "mds"]}, Figure().subplots())
        'Bar chart. rejected: mds 75%, energy 25%.'
    """
    _check_any(objected)
    percent = {}
    for label, names in objected.items():
        counts = Counter(names)
        percent[label] = {name: 100 * n / counts.total() for name, n in counts.items()}
    total = Counter[str]()
    for shares in percent.values():
        total.update(shares)
    order = [name for name, _ in total.most_common(most)]
    height = 0.8 / len(percent)
    for number, (label, shares) in enumerate(percent.items()):
        y = np.arange(len(order)) + (number - (len(percent) - 1) / 2) * height
        values = [shares.get(name, 0.0) for name in order]
        colour, hatch = LINES[number % MANY][0], HATCHES[number % MANY]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        drawing = ax.barh(y, values, height * 0.92, label=label, linewidth=0, **style)
        numbers = [f"{v:.0f}" if v >= 0.5 else "" for v in values]
        ax.bar_label(drawing, numbers, padding=2, fontsize=7.5)
    _name_rows(ax, order, "% of the rejected images")
    ax.margins(x=0.1)
    return "Bar chart. {}.".format(
        "; ".join(
            f"{label}: {', '.join(f'{n} {shares[n]:.0f}%' for n in order if n in shares)}"
            for label, shares in percent.items()
        )
    )


def heat_map(
    why: Explanation,
    ax: Any,
    image: int = 0,
    layer: str | None = None,
    picture: Image.Image | None = None,
) -> str:
    """Where in an image the energy lies that a layer's norm comes from.

    Args:
        why: what `FuseNorm.explain` returns.
        ax: matplotlib's axes.
        image: its number in `why`.
        layer: a name in `why.maps`; None = the layer that contributes least.
        picture: the image, to be shown in grey under the heat map.
    """
    layer = layer or lowest_layer(why, image)
    heat = why.maps[layer][image]
    ax.imshow(overlaid(picture or Image.new("L", (heat.shape[1], heat.shape[0])), heat))
    ax.set_title(layer)
    ax.set_axis_off()
    return f"Heat map of {layer}: most energy in the {where(heat)}."


def lowest_layer(why: Explanation, image: int) -> str:
    """Of the experts that have heat maps, the one whose contribution is furthest below its mean."""
    rows = [row for row, name in enumerate(why.experts) if name in why.maps]
    return why.experts[max(rows, key=lambda row: float(why.below_mean[row, image]))]


def overlaid(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A picture in grey under its heat map `[H, W]`, in cividis from dark (none) to yellow."""
    from matplotlib import colormaps

    values = heat.detach().cpu().float().numpy()
    scaled = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    size = (max(picture.width, FEW), max(picture.height, FEW))
    smooth = Image.fromarray((255 * scaled).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    colours = colormaps["cividis"](np.asarray(smooth) / 255.0)[..., :3]
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.NEAREST)) / 255.0
    mixed = 0.35 * grey[..., None] + 0.65 * colours
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def where(heat: Tensor) -> str:
    """In which part of an image a heat map `[H, W]` is largest."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    up = ("upper", "middle", "lower")[int(3 * (row + 0.5) / heat.shape[0])]
    side = ("left", "centre", "right")[int(3 * (column + 0.5) / heat.shape[1])]
    return "centre" if (up, side) == ("middle", "centre") else f"{up} {side}"


def bars(rows: Sequence[tuple[str, float, Guarantee | None]], ax: Any, asked: float) -> str:
    """The accepted share of each class, and the interval that is promised."""
    ax.barh(range(len(rows)), [100 * share for _, share, _ in rows], 0.7, color=BLUE, alpha=0.4)
    for row, (_, _, promised) in enumerate(rows):
        if promised is not None:
            ends = 100 * promised.low, 100 * promised.high
            ax.plot(ends, (row, row), color=INK, linewidth=1.6, marker="|", markersize=5)
    ax.axvline(100 * asked, color=SOFT, linestyle=DOTTED, linewidth=1)
    _name_rows(ax, [name for name, *_ in rows], "% accepted")
    ax.set_xlim(0, 101)
    return f"Bar chart: {', '.join(f'{name} {share:.0%}' for name, share, _ in rows)}."


def dots(groups: Mapping[str, Mapping[str, float]], ax: Any, axis: str) -> str:
    """One line per name, one dot per group."""
    _check_any(groups)
    names = list(next(iter(groups.values())))
    for number, (group, values) in enumerate(groups.items()):
        style = {"color": LINES[number % MANY][0], "markersize": 4.5, "label": group}
        ax.plot([values[name] for name in names], range(len(names)), DOTS[number % MANY], **style)
    _name_rows(ax, names, axis)
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(True)
    best = "; ".join(f"{g}: best {max(v, key=v.__getitem__)}" for g, v in groups.items())
    return f"Dot chart. {best}."


def _name_rows(ax: Any, names: Sequence[str], axis: str) -> None:
    """The first name at the top, and the label of the other axis."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.invert_yaxis()
    ax.set_xlabel(axis)
