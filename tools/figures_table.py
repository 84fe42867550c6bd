"""Write the table of figures in docs/concepts/metrics.md: `python -m tools.figures_table`."""

from __future__ import annotations

import re
from pathlib import Path

from sparsight.figures import FIGURES

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "metrics.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def table() -> str:
    """All figures as a table in Markdown."""
    rows = [("key", "label", "what it says", "better"), ("---",) * 4]
    for figure in FIGURES:
        key, better = figure.key.replace("*", "…"), figure.better or "–"
        rows.append((f"`{key}`", figure.label, figure.gloss, better))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(page: str) -> str:
    """The page with the table between its marks.

    Raises:
        ValueError: the page has not the two marks, once each.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE}: must have {BEGIN} and {END}, once each.")
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return between.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
