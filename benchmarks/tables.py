"""What benchmarks share: on what they ran, and a Markdown table that is printed and kept."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import sparsight
from sparsight.files import write_text

FOLDER = Path(__file__).parent / "tables"


def machine() -> dict[str, Any]:
    """Date, processor, memory and versions."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * size / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sparsight": sparsight.__version__,
    }


def show(title: str, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the rows as a Markdown table under what they were measured on; write it to `out`."""
    where = " · ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    text = f"### {title}\n\n{where}\n\n{markdown(rows)}\n"
    print(text, flush=True)
    write_text(out, text)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with the first row's keys as its head."""
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
