"""What pages are made of: tiles, tables and plots, as words that are ready to be shown."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Beside:
    """A baseline's figure under a tile."""

    name: str
    value: str


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    name: str
    term: str
    value: str
    beside: tuple[Beside, ...]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    term: str
    cells: tuple[str, ...]
    strong: bool = False
    """Whether all of it stands out."""
    group: str = ""
    """Heading above it, where a group of rows begins."""


@dataclass(frozen=True)
class Table:
    """A table: the first column names the rows; `columns` head the cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    strong: int = 0
    """Column that stands out: the SAE's own."""


@dataclass(frozen=True)
class Plot:
    """A plot with its words."""

    title: str
    text: str
    svg: Markup
