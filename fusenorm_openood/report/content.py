"""What a report says, before it becomes a page; text is plain and is escaped when rendered."""

from dataclasses import dataclass

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
