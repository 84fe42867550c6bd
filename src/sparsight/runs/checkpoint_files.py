"""Folders of checkpoints: written under another name and renamed when whole, checked when read.

`FOLDER/STEP/state.json` holds the version of the format, the step, and checksums of itself and of
each file beside it; whatever else it holds is up to its writer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, sha256_file, sha256_json, write_json
from sparsight.leftovers import remove_temporaries

FORMAT_VERSION = 1
KEPT = 2
STATE = "state.json"
PARTIAL = ("[0-9]*",)
"""Names of checkpoints, for `temporaries`."""

Found = TypeVar("Found")


def write(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    write_files: Callable[[Path], Iterable[str]],
) -> Path:
    """Write a checkpoint and remove the oldest ones, except for the last two.

    Checkpoints of later steps are removed, too: a run at this step could not use them.

    Args:
        folder: folder of all checkpoints.
        step: number of steps that were done.
        state: JSON-compatible values besides version, step and checksums.
        write_files: writes the files into a folder, and returns their names in it.

    Raises:
        SparsightError: writing failed; earlier checkpoints are untouched.
    """
    target = folder / f"{step:09d}"
    partial = folder / f".{step:09d}.tmp"
    remove_temporaries(folder, PARTIAL)
    try:
        files = write_files(partial)
        sha256 = {file: sha256_file(partial / file) for file in files}
        whole = {"step": step, **state, "sha256": sha256}
        checksum = sha256_json(whole)
        version = {"format_version": FORMAT_VERSION}
        write_json(partial / STATE, {**version, **whole, "checksum": checksum})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SparsightError) as error:
        raise SparsightError(f"{target}: the checkpoint could not be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    there = found(folder)
    place = there.index(target)
    for useless in (*there[: max(0, place + 1 - KEPT)], *there[place + 1 :]):
        shutil.rmtree(useless, ignore_errors=True)
    return target


def read_latest(
    folder: Path, read: Callable[[Path, dict[str, Any]], Found]
) -> tuple[Found | None, list[str]]:
    """Read the newest intact checkpoint; also return what is wrong with newer ones.

    Args:
        folder: folder of all checkpoints.
        read: makes something of a checkpoint's folder and state, once its checksums are right.

    Raises:
        UserError: a checkpoint has another version of the format.
        SparsightError: there are checkpoints, but none is intact.
    """
    problems: list[str] = []
    candidates = found(folder)
    for path in reversed(candidates):
        try:
            return _read(path, read), problems
        except UserError:
            raise  # it may be intact: continuing from an older one would lose work
        except SparsightError as error:
            problems.append(str(error))
    if candidates:
        raise SparsightError(
            f"{folder}: no checkpoint is intact. {' '.join(problems)} "
            "Remove the folder to train from the start."
        )
    return None, problems


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, without reading it."""
    return next(reversed(found(folder)), None)


def newest_step(folder: Path) -> int:
    """Return the number of steps of the newest checkpoint, without reading it; 0 if none."""
    path = newest(folder)
    return 0 if path is None else int(path.name)


def found(folder: Path) -> list[Path]:
    """Return all checkpoints, oldest first, without reading them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's `state.json` and compare its own checksum.

    Raises:
        UserError: it has another version of the format.
        SparsightError: it is missing or damaged.
    """
    try:
        state = read_json(path / STATE)
    except UserError as error:  # a damaged file is nobody's mistake
        raise SparsightError(str(error)) from error
    version = state.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path / STATE}: format_version is {version!r}; this Sparsight reads "
            f"{FORMAT_VERSION}. Continue with the version that wrote it, or choose another folder."
        )
    # Absent in checkpoints of earlier versions of Sparsight.
    expected = state.pop("checksum", None)
    if expected is not None and sha256_json(state) != expected:
        raise SparsightError(f"{path / STATE}: is damaged (checksum).")
    return state


def newest_state(folder: Path) -> dict[str, Any]:
    """Return the newest intact `state.json`; {} if there is none."""
    for path in reversed(found(folder)):
        with suppress(SparsightError):  # `read_latest` reports it
            return read_state(path)
    return {}


def _read(path: Path, read: Callable[[Path, dict[str, Any]], Found]) -> Found:
    state = read_state(path)
    try:
        if state["step"] != int(path.name):
            raise SparsightError(f"{path / STATE}: belongs to step {state['step']}.")
        for file, expected in state["sha256"].items():
            if not (path / file).exists() or sha256_file(path / file) != expected:
                raise SparsightError(f"{path / file}: is missing or damaged (checksum).")
        return read(path, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise SparsightError(f"{path / STATE}: {error} is missing or malformed.") from error
