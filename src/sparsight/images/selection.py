"""A selection of indices as short text, `[0:100,250,300:400:2]`, and back."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from sparsight.errors import UserError

_PART = r"\d+(?::\d+(?::\d+)?)?"
_SELECTION = re.compile(rf"^(?P<spec>.+)\[(?P<parts>(?:{_PART})(?:,{_PART})*|)\]$", re.DOTALL)


def format_selection(indices: npt.NDArray[np.int64]) -> str:
    """`[…]` with rising runs of equal step as `start:stop:step`, order and repeats kept."""
    parts: list[str] = []
    steps = np.diff(indices)
    start, n = 0, len(indices)
    while start < n:
        end = start  # the run is indices[start … end]
        if start < n - 1 and steps[start] > 0:
            changes = np.flatnonzero(steps[start : start + 64] != steps[start])
            if not changes.size:
                changes = np.flatnonzero(steps[start:] != steps[start])
            end = start + int(changes[0]) if changes.size else n - 1
        if end - start < 2:
            parts.append(str(indices[start]))
            start += 1
            continue
        step = int(steps[start])
        parts.append(f"{indices[start]}:{indices[end] + 1}" + (f":{step}" if step > 1 else ""))
        start = end + 1
    return f"[{','.join(parts)}]"


def split_selection(spec: str) -> tuple[str, list[int] | None]:
    """`"photos[0:3,9]"` → `("photos", [0, 1, 2, 9])`; None where there is no selection.

    Raises:
        UserError: a step of 0.
    """
    match = _SELECTION.match(spec)
    if match is None:
        return spec, None
    indices: list[int] = []
    for part in filter(None, match["parts"].split(",")):
        numbers = [int(number) for number in part.split(":")]
        if len(numbers) == 3 and numbers[2] == 0:
            raise UserError(f"{part!r} in {spec!r}: the step must be 1 or more.")
        indices += range(*numbers) if len(numbers) > 1 else numbers
    return match["spec"], indices
