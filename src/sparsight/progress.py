"""The one way to show progress: a bar on a terminal and in a notebook, plain lines when piped."""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from sparsight.notebooks import in_kernel

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_UPDATES = 0.25
"""Seconds between updates in a notebook."""


@dataclass
class ProgressLine:
    """A task in progress: call `advance(n, note)`; rate and time left are shown automatically."""

    title: str
    total: int | None
    unit: str
    _bar: Progress | None = None
    _start: float = field(default_factory=time.monotonic)
    _first: int = 0
    _done: int = 0
    _printed: float = field(default_factory=time.monotonic)
    _note: str = ""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` (figures, say) is shown after the rate."""
        self._done += n
        if self._bar is not None:
            text = self._rate() + (f" · {note}" if note else "")
            self._bar.update(self._bar.task_ids[0], completed=self._done, note=text)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(self._line(note), file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """Set the number of units, if it was not known at the start."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=total)

    def finish(self, note: str = "") -> None:
        """Print the closing line, if there is no bar."""
        if self._bar is None:
            print(self._line(note), file=sys.stderr, flush=True)

    def _per_second(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def _rate(self) -> str:
        return f"{self._per_second():,.0f} {self.unit}/s"

    def _line(self, note: str) -> str:
        total = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.title}: {self._done:,}{total} {self.unit}", self._rate()]
        if self.total is not None and self._done < self.total and self._done > self._first:
            parts.append(f"{(self.total - self._done) / self._per_second():,.0f} s left")
        if note:
            parts.append(note)
        return " · ".join(parts)


@contextmanager
def progress(
    title: str, total: int | None, unit: str, *, done: int = 0, quiet: bool = False
) -> Iterator[ProgressLine]:
    """Show a task of `total` units, `done` of which were done before (by an interrupted run)."""
    if quiet:
        yield _Silent(title, total, unit)
        return
    if in_kernel():
        shown = NotebookLine(title, total, unit, _first=done, _done=done)
        shown.show()
        yield shown
        shown.finish()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        line = ProgressLine(title, total, unit, _first=done, _done=done)
        yield line
        line.finish()
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as bar:
        bar.add_task(title, total=total, completed=done, note="")
        yield ProgressLine(title, total, unit, _bar=bar, _first=done, _done=done)


class NotebookLine(ProgressLine):
    """A bar in a notebook: one output, which is replaced as the task goes on."""

    _handle: Any = None

    def show(self) -> None:
        """Put the bar into the output of the cell."""
        from IPython.display import display

        self._handle = display(self._bundle(""), raw=True, display_id=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units as done; the output changes four times a second at most."""
        self._done += n
        self._note = note
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_UPDATES:
            self._printed = time.monotonic()
            self._handle.update(self._bundle(note), raw=True)

    def expect(self, total: int) -> None:
        """Set the number of units, if it was not known at the start."""
        self.total = total

    def finish(self, note: str = "") -> None:
        """Leave the last state of the bar."""
        self._handle.update(self._bundle(note or self._note), raw=True)

    def _bundle(self, note: str) -> dict[str, str]:
        """Return the bar as HTML, and as text for front ends without HTML."""
        line = self._line(note)
        share = f' value="{self._done}" max="{max(self.total, 1)}"' if self.total else ""
        bar = f'<progress{share} style="width:16em;vertical-align:middle"></progress>'
        return {
            "text/html": f"<div>{bar} {html.escape(line)}</div>",
            "text/plain": line,
        }


class _Silent(ProgressLine):
    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n

    def finish(self, note: str = "") -> None:
        return


def in_words(seconds: float) -> str:
    """Put a duration into words, e.g. "about 12 minutes"."""
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"about {seconds / size:,.0f} {unit}s"
    return f"about {max(1, round(seconds)):,} second{'s' * (round(seconds) > 1)}"


def logger() -> logging.Logger:
    """Return the logger "sparsight"; it writes INFO and above to stderr if nothing else is set."""
    ours = logging.getLogger("sparsight")
    if not ours.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    return ours
