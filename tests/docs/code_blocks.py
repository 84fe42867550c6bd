"""Read the code blocks of a page, and the marks that say why a block is not run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w+-]*)(?P<title>[^\n]*)\n"
    r"(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    """The line on which its code begins, counted from 1."""

    language: str
    title: str
    text: str
    reason: str | None
    """Why the test does not run it, if the page has a mark."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = []
    for match in _BLOCK.finditer(text):
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["text"].splitlines()]
        title = re.search(r'title="([^"]+)"', match["title"])
        blocks.append(
            Block(
                line=text.count("\n", 0, match.start("text")) + 1,
                language=match["language"],
                title=title[1] if title else "",
                text="\n".join(lines) + "\n",
                reason=match["reason"],
            )
        )
    return blocks


MADE_THERE = {
    "README.md": ("acts", "runs"),
    "docs/index.md": ("acts", "runs"),
    "docs/tutorials/photos.md": ("acts", "runs"),
    "docs/guide/extract.md": ("acts",),
    "docs/guide/train.md": ("runs",),
    "docs/tutorials/clip-with-text.md": ("acts", "runs"),
}
"""Folders of the quick start that a page makes itself, so that they must not exist before."""
