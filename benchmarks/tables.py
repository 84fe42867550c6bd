"""Shared by benchmarks: facts about the machine, and a Markdown table that is printed and kept.

Tables are kept in `RESULTS.md`, each between two marks with its name, by which pages of the
documentation include it.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import sparsight
from sparsight.files import write_text

RESULTS = Path(__file__).parent / "RESULTS.md"
QUALITY = Path(__file__).parent / "QUALITY.md"
"""The file for the quality of architectures."""

HEAD = """# Results

Written by the benchmarks of this folder: each puts its table in the place of its last one. Rates
depend on the machine; compare what stands in one table.
"""


def machine() -> dict[str, Any]:
    """Date, processor, memory and versions."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(pages * size / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sparsight": sparsight.__version__,
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep(
    title: str,
    rows: Sequence[dict[str, Any]],
    out: Path = RESULTS,
    versions: Mapping[str, str] | None = None,
    name: str | None = None,
) -> None:
    """Print the rows as a Markdown table, below facts about the machine; keep it in `out`.

    Args:
        title: title of the table.
        rows: rows of the table.
        out: the file; a table of the same name there is replaced, others stay.
        versions: versions of further packages.
        name: name of the table; by default the words of the title.
    """
    name = name or re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    facts = machine() | dict(versions or {})
    where = " · ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    text = f"### {title}\n\n{where}\n\n{markdown(rows)}\n"
    print(text, flush=True)
    before = out.read_text(encoding="utf-8") if out.exists() else HEAD
    begin, end = (f"<!-- --8<-- [{side}:{name}] -->\n" for side in ("start", "end"))
    section = f"{begin}{text}{end}"
    if begin in before:
        head, rest = before.split(begin, 1)
        write_text(out, head + section + rest.split(end, 1)[1])
    else:
        write_text(out, f"{before}\n{section}")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Make a table with the first row's keys as its head."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_text(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
