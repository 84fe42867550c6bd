"""How objects are shown in notebooks: tables in HTML, and pandas data frames."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparsight.errors import MissingExtra

if TYPE_CHECKING:
    import pandas


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Make an HTML table of names and values, for `_repr_html_`; both are escaped."""
    cells = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def html_grid(head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """Make an HTML table with a head; the first cell of each row names the row. All text is
    escaped.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        first, *rest = (html.escape(cell) for cell in cells)
        return f"<tr><th>{first}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in rest)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>{below}"


def data_frame(columns: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Make a pandas data frame from columns by name, or from rows; keys may be absent from a row.

    Raises:
        MissingExtra: pandas is not installed.
    """
    need_pandas()
    import pandas

    return pandas.DataFrame(columns)


def need_pandas() -> None:
    """Raise a `MissingExtra` unless pandas can be imported."""
    if find_spec("pandas") is None:
        raise MissingExtra("pandas")


def in_kernel() -> bool:
    """Return whether a Jupyter kernel runs this process, so that it can show HTML that changes."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
