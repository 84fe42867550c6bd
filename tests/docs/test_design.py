from __future__ import annotations

import dataclasses
import importlib
import re
from inspect import getsource
from typing import Any

import pytest
from code_blocks import ROOT

NAMES = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)


def look_up(name: str) -> Any:
    """Return the object that a dotted name below `sparsight` means."""
    found: Any = importlib.import_module("sparsight")
    path = "sparsight"
    for part in name.split("."):
        path = f"{path}.{part}"
        known = {field.name for field in dataclasses.fields(found)} if _has_fields(found) else set()
        if part in known or part in getattr(found, "__annotations__", {}):
            return part
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            if isinstance(found, type) and re.search(rf"self\.{part}\b *[:=]", getsource(found)):
                return part
            found = getattr(found, part)
    return found


def _has_fields(found: Any) -> bool:
    return isinstance(found, type) and dataclasses.is_dataclass(found)


def test_the_design_names_what_matters() -> None:
    assert len(NAMES) > 50


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_design_exist(name: str) -> None:
    assert look_up(name) is not None
