"""Whether what lies in a folder is a part of this very run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsight.config import first_difference, value_at
from sparsight.errors import UserError


def refuse_difference(
    path: Path, there: Mapping[str, Any], own: Mapping[str, Any], what: str = "a run"
) -> None:
    """Make sure that a file or folder is of this run.

    Args:
        path: of the file or folder.
        there: what it is of.
        own: what this run is.
        what: what it holds, for the message.

    Raises:
        UserError: it is of another run; the message names the first field that differs.
    """
    field = first_difference(there, own)
    if field is None:
        return
    then, now = ("none" if x is None else x for x in (value_at(there, field), value_at(own, field)))
    raise UserError(
        f"{path}: holds {what} that differs in {field!r} ({then} there, {now} now). Choose another "
        "folder, or remove this one."
    )


def refuse_other_checkpoint(
    folder: Path, there: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> None:
    """Make sure that a checkpoint is of this run.

    Args:
        folder: of the checkpoints.
        there: what the checkpoint is of; None in those of earlier versions of Sparsight.
        own: what this run is.

    Raises:
        UserError: it is of another run.
    """
    if there is not None:
        refuse_difference(folder, there, own, "checkpoints of a run")


@contextmanager
def damaged_if(begun: bool) -> Iterator[None]:
    """Compare a `config.toml` with a run: one that says otherwise than the checkpoints is damaged.

    Args:
        begun: whether the checkpoints, which have checksums, are of this very run. What the block
            raises then is told as a warning.

    Raises:
        UserError: the `config.toml` is of another run, and no checkpoint contradicts it.
    """
    try:
        yield
    except UserError as error:
        if not begun:
            raise
        warnings.warn(
            f"{error} It counts as damaged, for the checkpoints are of this very run.",
            stacklevel=4,
        )
