"""Read the lists of words and phrases that were written for the vocabulary."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
_LIST = re.compile(r"\{(\w+)\}")


def phrases(text: str) -> Iterator[tuple[str, str]]:
    """Yield each phrase with its category, in the order of the file.

    Raises:
        ValueError: a line stands before the first category.
        KeyError: a list is not defined above its first use.
    """
    lists: dict[str, list[str]] = {}
    category = ""
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("$"):
            name, _, members = line[1:].partition(":")
            lists[name] = _members(members)
        elif line.startswith("["):
            category = line.strip("[]")
        elif not category:
            raise ValueError(f"{line!r} stands before the first category")
        else:
            for pattern in _members(line):
                for phrase in _expanded(pattern, lists):
                    yield phrase, category


def left_out() -> set[str]:
    """Return the words that keep an entry of WordNet out."""
    text = (HERE / "left_out.txt").read_text("utf-8")
    return {word for line in text.splitlines() if not line.startswith("#") for word in line.split()}


def _expanded(pattern: str, lists: dict[str, list[str]]) -> Iterator[str]:
    names = _LIST.findall(pattern)
    blank = _LIST.sub("{}", pattern)
    for members in itertools.product(*(lists[name] for name in names)):
        yield blank.format(*members)


def _members(line: str) -> list[str]:
    return [member.strip() for member in line.split(",") if member.strip()]
