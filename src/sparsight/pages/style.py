"""One style for all plots: colours that work in greyscale, thin lines, the page's text colour."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sparsight.files import write_bytes, write_text

PALETTE = ("#2f6f8f", "#d1793a", "#6d8f3c", "#8a5a9e", "#a63d40", "#5f6b76")
"""Colours of series, in order; they differ in lightness."""

SEQUENTIAL = "viridis"
"""Colour map of quantities; perceptually uniform."""

HEAT_COLOURS = "inferno"
"""Colour map laid over images; perceptually uniform."""

WIDTH = 4.4
"""Inches; narrow enough for nine-point text to be legible on a phone."""

NOTEBOOK_DPI = 110

# Stand-ins that become CSS variables, so that a plot follows the page's dark theme.
_INK, _FAINT, _GRID = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--muted)", _GRID: "var(--line)"}
_ON_WHITE = {_INK: "#1d2329", _FAINT: "#5f6b76", _GRID: "#dfe3e6"}

SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": _FAINT,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
}


_WHITE = ContextVar("_WHITE", default=False)


@contextmanager
def plot_style(*, on_white: bool | None = None) -> Iterator[None]:
    """Use Sparsight's Matplotlib settings inside the `with` block.

    Args:
        on_white: draw on white, for bitmaps and notebooks, whose colours no page can change;
            default: as in the enclosing block, else False.
    """
    white = _WHITE.get() if on_white is None else on_white
    settings = SETTINGS
    if white:
        settings = {key: _fixed(value) for key, value in SETTINGS.items()}
        settings["figure.facecolor"] = "#ffffff"
    before = _WHITE.set(white)
    try:
        with matplotlib.rc_context(settings):
            yield
    finally:
        _WHITE.reset(before)


def _fixed(value: Any) -> Any:
    return _ON_WHITE.get(value, value) if isinstance(value, str) else value


class NotebookFigure(Figure):
    """A figure that notebooks show even where nothing has imported pyplot."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=NOTEBOOK_DPI, metadata={"Software": None})
        return out.getvalue()


def figure(height: float, width: float = WIDTH) -> Figure:
    """Make a figure outside pyplot's global state; sizes in inches. Call inside `plot_style`."""
    return NotebookFigure(figsize=(width, height))


def to_svg(drawn: Figure, name: str, label: str) -> str:
    """Turn a figure into an `<svg>` element for a page: no prologue, no dates, no fixed size.

    Args:
        drawn: the figure.
        name: unique on the page; the ids inside are made from it.
        label: what a screen reader says.
    """
    out = io.StringIO()
    settings: Any = {**SETTINGS, "svg.hashsalt": name, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        drawn.savefig(out, format="svg", dpi=160, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    # Every figure numbers its groups alike; ids that are referred to carry the salt.
    text = re.sub(r'<g id="[A-Za-z]+_\d+(?:_\d+)*">', "<g>", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    width, height = drawn.get_size_inches()
    box = f"0 0 {width * 72:g} {height * 72:g}"
    head = (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="{box}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def save_svg(drawn: Figure, path: Path) -> None:
    """Write a plot to an SVG file, on white; the same plot gives the same bytes."""
    out = io.StringIO()
    settings: Any = {**SETTINGS, "svg.hashsalt": path.stem, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        drawn.savefig(out, format="svg", facecolor="#ffffff", metadata={"Date": None})
    text = out.getvalue()
    for stand_in, colour in _ON_WHITE.items():
        text = text.replace(stand_in, colour)
    write_text(path, text)


def save_png(drawn: Figure, path: Path, dpi: int = 160) -> None:
    """Write a plot that was drawn `on_white` to a PNG file."""
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=dpi, facecolor="#ffffff", metadata={"Software": None})
    write_bytes(path, out.getvalue())
