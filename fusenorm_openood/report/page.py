"""One HTML page that needs no other file."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.storage.files import check_writable, write_whole
from fusenorm_openood.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Facts = tuple[tuple[str, str], ...]  # names and values


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: what it shows.
        columns: headers, that of the row names first.
        rows: cells, the row's name first.
        strong: names of the rows that matter most.
        best: row and column numbers of cells that are the best of their column.
        prose: whether its cells are text, not numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[str] = frozenset()
    best: frozenset[tuple[int, int]] = frozenset()
    prose: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: its title, set above it.
        lines: more lines of the title.
        text: what it shows, for those who cannot see it.
        svg: the SVG file.
    """

    title: str
    lines: tuple[str, ...]
    text: str
    svg: str


@dataclass(frozen=True)
class Picture:
    """A small image as a data URI, and its alternative text."""

    uri: str
    alt: str


@dataclass(frozen=True)
class Card:
    """One image: its pictures, what is known of it, and a remark."""

    name: str
    pictures: tuple[Picture, ...]
    facts: Facts
    remark: str = ""


@dataclass(frozen=True)
class Cards:
    """Images that belong together."""

    title: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page; only what it has is shown."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    galleries: tuple[Cards, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole page.

    Attributes:
        title: what was evaluated or judged.
        facts: detector, network, settings, number of images.
        highlights: the figures to see first, with what they are.
        sections: the parts of the page.
    """

    title: str
    facts: Facts
    highlights: Facts
    sections: tuple[Section, ...]


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


def render(report: Report, date: str | None = None) -> str:
    """The page of a report; the same report and date give the same page.

    Args:
        report: what the page says.
        date: when it was made (default: now).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawings = [
        [Markup(embedded(figure, f"s{s}f{f}")) for f, figure in enumerate(section.figures, 1)]
        for s, section in enumerate(report.sections, 1)
    ]
    return environment.get_template("page.html").render(
        report=report,
        drawings=drawings,
        date=date or f"{datetime.now():%d %B %Y, %H:%M}",
        version=__version__,
    )


def check_report(path: str | Path, option: str = "--report") -> None:
    """Raise ConfigError unless a report can be made and written; call it before any long work."""
    missing = [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{option} needs {' and '.join(missing)}: pip install 'fusenorm-openood[report]'"
        )
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a folder: give a file to {option}")
    check_writable(Path(path).absolute().parent, option)


def write_report(report: Report, path: str | Path) -> None:
    """Render a report and write it, completely or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    page = render(report)
    try:
        write_whole(
            Path(path), lambda file: file.write_bytes(page.encode("utf-8", "backslashreplace"))
        )
    except OSError as error:
        raise DataError(
            f"report {path} cannot be written ({error.strerror}): make room, or give another file"
        ) from None
