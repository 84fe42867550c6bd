"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/STEP/state.json` holds the step, the position in the data and a checksum of each file;
beside it, a folder a site (SITE; in a sweep NAME/SITE) with the SAE as `from_pretrained` reads it
and `training.safetensors`: optimiser, dead-latent counters, running figures, the average of the
weights. Random numbers are drawn from seeds alone, so that there are no random states to keep. A
checkpoint is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, sha256_file, write_json
from sparsight.sae.files import WEIGHTS, load_tensors, save_tensors
from sparsight.training.site import SiteTraining

FORMAT_VERSION = 1
KEPT = 2
_STATE = "state.json"
_TENSORS = "training.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read and checked.

    Attributes:
        step: steps that were done.
        cursor: position in the data, for the stream's `load_state_dict`.
        summed: vectors in each site's running figures.
        saes: for each site the tensors of the SAE.
        tensors: for each site what `SiteTraining.state` gave.
    """

    step: int
    cursor: dict[str, Any]
    summed: dict[str, int]
    saes: dict[str, dict[str, Tensor]]
    tensors: dict[str, dict[str, Tensor]]


def save(
    folder: Path, step: int, sites: Mapping[str, SiteTraining], cursor: Mapping[str, Any]
) -> Path:
    """Write a checkpoint and drop the oldest beyond the last two.

    Raises:
        SparsightError: it could not be written; earlier ones are untouched.
    """
    target = folder / f"{step:09d}"
    partial = folder / f".{step:09d}.tmp"
    _remove_partial(folder)
    try:
        for site, training in sites.items():
            training.sae.save_pretrained(partial / site)
            save_tensors(training.state(), partial / site / _TENSORS)
        files = [f"{site}/{name}" for site in sites for name in (WEIGHTS, _TENSORS)]
        write_json(
            partial / _STATE,
            {
                "format_version": FORMAT_VERSION,
                "step": step,
                "cursor": dict(cursor),
                "summed": {site: training.summed for site, training in sites.items()},
                "sha256": {file: sha256_file(partial / file) for file in files},
            },
        )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SparsightError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SparsightError(f"{target}: the checkpoint could not be written ({error})") from error
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(folder: Path, sites: tuple[str, ...]) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones.

    Raises:
        UserError: one that is looked at is of another version of the format.
        SparsightError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    candidates = _found(folder)
    for path in reversed(candidates):
        try:
            return _read(path, sites), problems
        except UserError:
            raise  # it may be whole: to go on from an older one would lose work
        except SparsightError as error:
            problems.append(str(error))
    if candidates:
        raise SparsightError(
            f"{folder}: no checkpoint is whole. {' '.join(problems)} "
            "Remove the folder to train from the start."
        )
    return None, problems


def members(folder: Path) -> frozenset[str]:
    """What the newest checkpoint that can be read holds; nothing where there is none."""
    for path in reversed(_found(folder)):
        try:
            return frozenset(read_json(path / _STATE)["summed"])
        except (UserError, KeyError, TypeError):
            continue  # `load_latest` tells of it
    return frozenset()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, unread."""
    return next(reversed(_found(folder)), None)


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def _remove_partial(folder: Path) -> None:
    """Remove what a killed `save` left."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _read(path: Path, sites: tuple[str, ...]) -> Checkpoint:
    try:
        state = read_json(path / _STATE)
    except UserError as error:  # as a damaged file it is no one's mistake
        raise SparsightError(str(error)) from error
    version = state.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path / _STATE}: format_version is {version!r}; this Sparsight reads "
            f"{FORMAT_VERSION}. Go on with the Sparsight that wrote it, or choose another folder."
        )
    try:
        for file, expected in state["sha256"].items():
            if not (path / file).exists() or sha256_file(path / file) != expected:
                raise SparsightError(f"{path / file}: is missing or damaged (checksum).")
        return Checkpoint(
            state["step"],
            state["cursor"],
            {site: state["summed"][site] for site in sites},
            {site: load_tensors(path / site / WEIGHTS) for site in sites},
            {site: load_tensors(path / site / _TENSORS) for site in sites},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SparsightError(
            f"{path / _STATE}: lacks {error} or holds it in another form."
        ) from error
