"""What other packages add: checkpoint formats, image sources and verbs, found by entry points.

The built-in ones are registered in the same groups, in pyproject.toml. Each room knows its own and
asks here only for the others: reading all installed metadata takes longer than the whole of
`sparsight --help`, and the metadata of an editable installation may be older than its code.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, NamedTuple

from sparsight.errors import SparsightError, UserError, is_out_of_memory

FORMAT_PLUGINS = "sparsight.formats"
SOURCE_PLUGINS = "sparsight.sources"
VERB_PLUGINS = "sparsight.verbs"

_OWN = "sparsight-"
_METADATA = (".dist-info", ".egg-info")


class Plugin(NamedTuple):  # a dataclass takes longer to import than all the rest of this
    """An entry point of another package."""

    group: str
    """`FORMAT_PLUGINS`, `SOURCE_PLUGINS` or `VERB_PLUGINS`."""

    name: str
    """The name by which users call it."""

    target: str
    """Where it is: "module:attribute"."""

    package: str
    """Name and version of the package that registers it."""

    summary: str
    """The package's one-line description of itself."""

    def load(self) -> Any:
        """Import what the entry point names.

        Raises:
            SparsightError: the import fails, in whatever way.
        """
        module, _, attribute = self.target.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for part in filter(None, attribute.split(".")):
                value = getattr(value, part)
        except (Exception, SystemExit) as error:
            raise self.fault(f"cannot be loaded ({type(error).__name__}: {error})") from error
        return value

    def call(self, argument: Any) -> Any:
        """Load the plug-in and call it.

        Raises:
            SparsightError: it cannot be loaded, or fails with an error that only its author
                understands.
        """
        function = self.load()
        try:
            return function(argument)
        except Exception as error:
            if isinstance(error, SparsightError | OSError) or is_out_of_memory(error):
                raise
            what = f"failed ({type(error).__name__}: {error}; `--traceback` shows where)"
            raise self.fault(what) from error

    def fault(self, what: str) -> SparsightError:
        """Return an error that names the package; `what` says in a clause what is wrong."""
        return SparsightError(
            f"{self.name!r} of the package {self.package} {what}. Its entry point is "
            f"{self.target} in {self.group!r}. Update or uninstall the package."
        )


@cache
def all_plugins(group: str) -> tuple[Plugin, ...]:
    """Return everything that other packages register in a group, sorted by package and name.

    A package with damaged metadata is left out, and the logger "sparsight" warns about it.
    """
    by_package: dict[str, list[Plugin]] = {}
    for folder in _mentioning(group):
        try:
            package, plugins = _read(folder, group)
        except Exception as error:
            warn_once(f"{folder}: not read for {group!r} ({type(error).__name__}: {error}).")
            continue
        by_package.setdefault(package, plugins)  # as for Python, the first on the path counts
    return tuple(plugin for _, plugins in sorted(by_package.items()) for plugin in plugins)


def usable_plugins(group: str, own: Collection[str]) -> dict[str, Plugin]:
    """Return by name what other packages register in a group, without names that are taken.

    The logger "sparsight" warns once about each plug-in that is left out.

    Args:
        group: the group of entry points.
        own: Sparsight's own names in the group.
    """
    kept: dict[str, Plugin] = {}
    for plugin in all_plugins(group):
        problem = name_clash(plugin, own)
        if problem is None:
            kept[plugin.name] = plugin
        else:
            warn_once(str(plugin.fault(f"is {problem}")))
    return kept


def name_clash(plugin: Plugin, own: Collection[str]) -> str | None:
    """Return why a plug-in cannot have its name; None if it can.

    Args:
        plugin: an entry point.
        own: Sparsight's own names in its group.
    """
    if plugin.name in own:
        return "left out: Sparsight itself has one of that name"
    others = [
        other.package
        for other in all_plugins(plugin.group)
        if other.name == plugin.name and other != plugin
    ]
    return f"left out: {' and '.join(others)} registers that name, too" if others else None


def plugin_named(group: str, name: str) -> Plugin | None:
    """Return the plug-in with this name; None if no package registers one.

    Raises:
        UserError: several packages register one.
    """
    plugins = [plugin for plugin in all_plugins(group) if plugin.name == name]
    if len(plugins) > 1:
        packages = " and ".join(plugin.package for plugin in plugins)
        raise UserError(
            f"several packages register {name!r} in {group!r}: {packages}. "
            "Uninstall all but one of them."
        )
    return plugins[0] if plugins else None


@cache
def warn_once(problem: str) -> None:
    """Warn about a plug-in, once per process."""
    from sparsight.progress import logger

    logger().warning("%s", problem)


def _read(folder: str, group: str) -> tuple[str, list[Plugin]]:
    """Return the name of the package whose metadata a folder holds, and its plug-ins in a group."""
    from importlib.metadata import Distribution

    distribution = Distribution.at(folder)
    package = f"{distribution.name} {distribution.version}"
    metadata = distribution.metadata
    summary = metadata["Summary"] if "Summary" in metadata else ""  # noqa: SIM401 - it has no get
    points = sorted(distribution.entry_points.select(group=group), key=lambda point: point.name)
    return distribution.name, [
        Plugin(group, point.name, point.value.partition("[")[0].strip(), package, summary)
        for point in points
    ]


def _mentioning(group: str) -> Iterator[str]:
    """Give the folders on `sys.path` with metadata that mention a group, except our own."""
    section = f"[{group}]".encode()
    for place in dict.fromkeys(sys.path):
        try:
            with os.scandir(place or os.curdir) as entries:
                folders = [
                    entry.path
                    for entry in entries
                    if entry.name.endswith(_METADATA) and not entry.name.startswith(_OWN)
                ]
        except OSError:  # a zip file, or nothing
            continue
        for folder in folders:
            try:
                # Not as a Path: `sparsight --help` does without pathlib, which takes 4 ms to load.
                with open(f"{folder}/entry_points.txt", "rb") as file:  # noqa: PTH123
                    if section in file.read():
                        yield folder
            except OSError:  # most packages have no entry points
                continue
