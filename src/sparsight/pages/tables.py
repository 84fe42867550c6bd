"""The parts of pages: tiles, tables and plots, as text ready to be shown."""

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
    """A row of a table."""

    name: str
    term: str
    cells: tuple[str, ...]
    strong: bool = False
    """Whether the whole row stands out."""
    group: str = ""
    """Heading above the row, if it begins a group."""
    best: frozenset[int] = frozenset()
    """Places of the best cells, which stand out."""


@dataclass(frozen=True)
class Table:
    """A table: the first column names the rows; `columns` head the cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    strong: int = -1
    """The column that stands out as a whole; −1: none."""


@dataclass(frozen=True)
class Plot:
    """A plot with its title and text."""

    title: str
    text: str
    svg: Markup
    dots: str = ""
    """For a scatter plot of latents, where its axes are, as JSON: with it, dots can be clicked."""
