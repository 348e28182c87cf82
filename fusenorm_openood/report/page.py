"""Render a report as one HTML page that needs no other file and asks nobody for anything."""

from datetime import datetime
from pathlib import Path

from fusenorm_openood.report.content import Report
from fusenorm_openood.report.drawing import embedded
from fusenorm_openood.version import __version__


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
