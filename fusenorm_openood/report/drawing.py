"""From matplotlib to SVG that can share a page with others; matplotlib is imported on first use."""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fusenorm_openood.report.content import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (3.7, 2.6)  # inches; 360 pixels of a phone show text of 8 points as 10.5 pixels
INK, SOFT, GRID = "#1a1a1a", "#595959", "#d0d0d0"
# Okabe and Ito's colours, each with a line style of its own: never colour alone.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
LINES = ((VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"))

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fusenorm",  # the same drawing has the same ids
    "text.parse_math": False,
    "font.size": 8.5,
    "legend.fontsize": 8,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def drawn(
    title: str,
    text: str,
    draw: "Callable[[Axes], None]",
    size: tuple[float, float] = SIZE,
    lines: tuple[str, ...] = (),
) -> Figure:
    """The figure that `draw` draws; without pyplot, and whatever the user's matplotlibrc says."""
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    with style.context(["default", _STYLE]):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.subplots())
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata=_NO_METADATA, transparent=True)
    return Figure(title, lines, text, file.getvalue())


def legend(ax: "Axes", backwards: bool = False) -> None:
    """A legend below the axes, where it hides nothing, in as many columns as fit."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        step = -1 if backwards else 1
        columns = int(72 * SIZE[0] // (42 + 4.8 * max(map(len, labels))))
        where: Any = {"loc": "outside lower center", "ncols": min(max(columns, 1), len(labels))}
        ax.figure.legend(handles[::step], labels[::step], columnspacing=1.2, **where)


def embedded(figure: Figure, prefix: str) -> str:
    """The `<svg>` element of a figure, its ids with a prefix, with its title and description."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(figure.svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {name for value in values for name in re.findall(r"(?:^|url\()#([^)]+)", value)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            linked = re.sub(r"(^|url\()#", rf"\1#{prefix}-", value) if "#" in value else value
            # A colour begins with # as well.
            is_link = key.endswith("href") or "url(#" in value
            element.set(key, f"{prefix}-{value}" if key == "id" else linked if is_link else value)
    described = " ".join((*figure.lines, figure.text))
    for number, (tag, content) in enumerate((("title", figure.title), ("desc", described))):
        child = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{prefix}-{tag}"})
        child.text = content
        root.insert(number, child)
    root.attrib.pop("width", None), root.attrib.pop("height", None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-desc"}
    return ElementTree.tostring(root, encoding="unicode")
