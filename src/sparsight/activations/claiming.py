"""Folders of shards under a manifest: who may write there, and which work is continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from sparsight.activations.manifest import MANIFEST
from sparsight.config import first_difference
from sparsight.errors import UserError
from sparsight.runs.folder import claimed


@runtime_checkable
class ShardManifest(Protocol):
    """How a folder of shards describes itself; it is complete once `state` is "complete"."""

    @property
    def state(self) -> str:
        """ "incomplete" until the last shard is written."""

    def identity(self) -> dict[str, Any]:
        """Return what two manifests must share to be parts of one."""

    def write(self, folder: Path) -> None:
        """Write the manifest into its folder."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest from its folder."""


M = TypeVar("M", bound=ShardManifest)


@contextmanager
def claimed_manifest(
    folder: Path,
    plan: M,
    *,
    what: str,
    is_a_folder: str,
    doing: str,
    in_words: Callable[[str, M, M], str],
) -> Iterator[M]:
    """Give the manifest to continue, while no other process may work in the same folder.

    Args:
        folder: the folder of the shards.
        plan: the manifest of this call's work; it is written if the folder has none.
        what: what the folder holds, for messages: "codes", say.
        is_a_folder: the same as a clause: "codes are a folder".
        doing: what another process would be doing: "encoding into".
        in_words: says how existing work differs, given the first field that does, its manifest, and
            the plan.

    Raises:
        UserError: the folder holds something else, or another process is using it.
        SparsightError: what is there is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; {is_a_folder}.")
    there = _manifest_in(folder, plan, what, in_words)
    if there is not None and there.state == "complete":
        yield there
        return
    with claimed(folder, doing):
        there = _manifest_in(folder, plan, what, in_words)
        if there is None:
            plan.write(folder)
        yield there or plan


def _manifest_in(
    folder: Path, plan: M, what: str, in_words: Callable[[str, M, M], str]
) -> M | None:
    """Return the manifest that is there, if any; it must be of the same work."""
    if not (folder / MANIFEST).exists():
        if folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no {what}.")
        return None
    there = type(plan).read(folder)
    field = first_difference(there.identity(), plan.identity())
    if field is not None:
        raise UserError(
            f"{folder}: holds {in_words(field, there, plan)}. Choose another folder, or remove "
            "this one."
        )
    return there
