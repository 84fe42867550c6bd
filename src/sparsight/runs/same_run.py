"""Whether what is in a folder belongs to this very run."""

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
    """Check that a file or folder belongs to this run.

    Args:
        path: the file or folder.
        there: the description of the run to which it belongs.
        own: the description of this run.
        what: what it holds, for the message.

    Raises:
        UserError: it belongs to another run; the message names the first field that differs.
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
    """Check that a checkpoint belongs to this run.

    Args:
        folder: folder of the checkpoints.
        there: the run to which the checkpoint belongs; None in checkpoints of earlier versions.
        own: the description of this run.

    Raises:
        UserError: it belongs to another run.
    """
    if there is not None:
        refuse_difference(folder, there, own, "checkpoints of a run")


@contextmanager
def damaged_if(begun: bool) -> Iterator[None]:
    """Compare a `config.toml` with a run: if it contradicts the checkpoints, it is damaged.

    Args:
        begun: whether the checkpoints, which have checksums, belong to this very run. What the
            block raises is then only a warning.

    Raises:
        UserError: the `config.toml` belongs to another run, and no checkpoint contradicts it.
    """
    try:
        yield
    except UserError as error:
        if not begun:
            raise
        warnings.warn(
            f"{error} It counts as damaged, because the checkpoints belong to this very run.",
            stacklevel=4,
        )
