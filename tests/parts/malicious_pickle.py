"""A pickle that leaves a file behind where it is loaded without care."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Opens:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")
