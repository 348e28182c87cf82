"""The content of an HTML page that needs no other file, and how it is rendered and written."""

import io
import re
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

from fusenorm_openood.errors import ConfigError, DataError, os_errors
from fusenorm_openood.report.plots import BLUE, GRID, INK, LINES, SOFT
from fusenorm_openood.storage.files import check_file, write_whole
from fusenorm_openood.version import __version__

Facts = tuple[tuple[str, str], ...]  # names and values

FOLDER = Path(__file__).parent
SIZE = (3.7, 2.6)  # inches; 360 pixels of a phone show text of 8 points as 10.5 pixels
ENCODED = ("utf-8", "backslashreplace")
SMALL = (1.9, 1.3)  # of small multiples, whose legend is drawn once
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


class Table(NamedTuple):
    """A table whose first column names the rows."""

    caption: str
    columns: tuple[str, ...]  # headers, that of the row names first
    rows: tuple[tuple[str, ...], ...]  # cells, the row's name first
    strong: frozenset[str] = frozenset()  # names of the rows that matter most
    best: frozenset[tuple[int, int]] = frozenset()  # row and column of the best of each column
    prose: bool = False  # whether its cells are text, not numbers


class Figure(NamedTuple):
    """A drawing."""

    title: str
    draw: Callable[[Any], str]  # on matplotlib's axes; returns in words what is shown
    size: tuple[float, float] = SIZE
    lines: tuple[str, ...] = ()  # more lines of the title
    legend: Literal["below", "none", "alone"] = "below"  # alone: in place of the axes


class Card(NamedTuple):
    """One image: its pictures, as data URIs with alternative texts, facts, and a remark."""

    name: str
    pictures: Facts
    facts: Facts
    remark: str = ""
    link: str = ""  # to its file


class Rows(NamedTuple):
    """A list of images that can be sorted and filtered; all have the same facts."""

    caption: str
    choose: frozenset[str]  # facts among whose values one chooses
    cards: tuple[Card, ...]


class Section(NamedTuple):
    """A part of the page; only what it has is shown."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    galleries: tuple[tuple[str, tuple[Card, ...]], ...] = ()  # titles and their cards
    key: Figure | None = None  # the legend of all figures
    folded: tuple[tuple[str, tuple[Figure, ...]], ...] = ()  # titles and their small multiples
    listed: Rows | None = None


class Report(NamedTuple):
    """A whole page."""

    title: str
    facts: Facts  # detector, network, settings, number of images; they come last
    highlights: Facts  # the figures to see first, with what they are
    sections: tuple[Section, ...]


def svg(figure: Figure, name: str) -> str:
    """The `<svg>` element of a figure, with a title and a description; a `name` fixes its ids.

    Drawn without pyplot, and whatever the user's matplotlibrc says.
    """
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    file = io.StringIO()
    with style.context(["default", FOLDER / "page.mplstyle", {"svg.hashsalt": name}]):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        axes = canvas.subplots()
        text = figure.draw(axes)
        if figure.legend != "none":
            _legend(canvas, axes)
        if figure.legend == "alone":
            axes.remove()
        if figure.size == SMALL:
            axes.set(xlabel="", ylabel="")
            axes.locator_params(nbins=3)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(file, format="svg", metadata=metadata, transparent=True)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(file.getvalue())
    for style_of_all in root.findall(f"{{{_SVG}}}defs[{{{_SVG}}}style]"):
        root.remove(style_of_all)  # it would hold for the whole page
    links = " ".join(value for element in root.iter() for value in element.attrib.values())
    for element in root.iter():
        if f"#{element.get('id')}" not in links:  # most ids are the same in all figures
            element.attrib.pop("id", None)
        if "style" in element.attrib:  # in the colours of the page, light or dark
            element.set("style", re.sub("#[0-9a-f]{6}", _variable, element.attrib["style"]))
    description = " ".join((*figure.lines, text))
    for number, (tag, content) in enumerate((("title", figure.title), ("desc", description))):
        child = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        child.text = content
        root.insert(number, child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img"}
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    return ElementTree.tostring(root, encoding="unicode")


def _legend(canvas: Any, axes: Any) -> None:
    """A legend below the axes, where it hides nothing, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = int(72 * canvas.get_figwidth() // (42 + 4.8 * max(map(len, labels))))
        where: Any = {"loc": "outside lower center", "ncols": min(max(columns, 1), len(labels))}
        canvas.legend(handles, labels, columnspacing=1.2, **where)


def _variable(match: re.Match[str]) -> str:
    names = {INK: "ink", SOFT: "soft", GRID: "line", BLUE: "blue", "#ffffff": "paper"}
    names |= {colour: f"line{number}" for number, (colour, _) in enumerate(LINES)}
    return f"var(--{names[match[0]]})" if match[0] in names else match[0]


def render(report: Report, date: str | None = None) -> str:
    """The HTML of a report made at a date (default: now); the same arguments give the same page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    how: Any = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, **how)
    environment.filters["svg"] = lambda figure, name: Markup(svg(figure, name))
    date = date or f"{datetime.now():%d %B %Y, %H:%M}"
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()  # no other script may run
    page = environment.get_template("page.html")
    about: Any = {"date": date, "version": __version__, "digest": digest}
    return page.render(report=report, script=Markup(script), **about)


def check_report(path: str | Path, option: str = "--report") -> None:
    """Raise ConfigError unless a report can be made and written; call it before any long work."""
    missing = [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{option} needs {' and '.join(missing)}: pip install 'fusenorm-openood[report]'"
        )
    check_file(Path(path), option, ".html", ".htm")


def write_report(report: Report, path: str | Path) -> None:
    """Render a report and write it, completely or not at all; DataError if it cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(Report("Photographs", (), (), ()), f"{folder}/report.html")
    """
    page = render(report).encode(*ENCODED)
    way_out = "make room, or give another file"
    with os_errors(DataError, f"report {path} cannot be written", way_out):
        write_whole(Path(path), lambda file: file.write_bytes(page))
