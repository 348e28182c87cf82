"""Charts with one line per name: bars and dots."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusenorm_openood.report.content import Figure
from fusenorm_openood.report.drawing import INK, LINES, SIZE, drawn, legend


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
