"""Folders of shards under a manifest: who may write there, and what is gone on with."""

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
    """What a folder of shards says of itself; complete once `state` is "complete"."""

    @property
    def state(self) -> str:
        """ "incomplete" until the last shard is written."""

    def identity(self) -> dict[str, Any]:
        """What two of them must share to be parts of one."""

    def write(self, folder: Path) -> None:
        """Write it into its folder."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from its folder."""


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
    """Give the manifest to go on with, while no other process works in the same folder.

    Args:
        folder: of the shards.
        plan: what is to be written; it is put there if nothing is.
        what: the folder holds, for messages: "codes", say.
        is_a_folder: the same as a clause: "codes are a folder".
        doing: what another process would be doing: "encoding into".
        in_words: how what is there differs, from the first field that does, what is there, and the
            plan.

    Raises:
        UserError: the folder holds something else, or another process is at it.
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
    """The manifest that is there, if any; it must be of the same work."""
    if not (folder / MANIFEST).exists():
        if folder.is_dir() and any(each.name[0] != "." for each in folder.iterdir()):
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
