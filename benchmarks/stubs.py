"""Empty modules that replace libraries which a package imports but the benchmark does not use."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any


def stub(*names: str, replace: Sequence[str] = ()) -> None:
    """Make `import NAME` succeed, without effect, for libraries that are absent.

    Args:
        names: the libraries.
        replace: modules to replace even if they are installed.
    """
    absent = {name for name in names if importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, _Stubs(absent | set(replace)))


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(name == each or name.startswith(f"{each}.") for each in self.names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
