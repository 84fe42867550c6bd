"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/STEP/state.json` holds the step, the position in the data and a checksum of each
file; beside it, a folder a site with the SAE as `from_pretrained` reads it and
`training.safetensors`. A checkpoint is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.files import read_json, sha256_file, write_json
from sparsight.training.site import SiteTraining

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
        tensors: for each site what `SiteTraining.state` gave.
    """

    step: int
    cursor: dict[str, Any]
    summed: dict[str, int]
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
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        sums = {}
        for site, training in sites.items():
            (partial / site).mkdir()
            training.sae.save_pretrained(partial / site)
            save_file(training.state(), partial / site / _TENSORS)
            sums[site] = sha256_file(partial / site / _TENSORS)
        write_json(
            partial / _STATE,
            {
                "step": step,
                "cursor": dict(cursor),
                "summed": {site: training.summed for site, training in sites.items()},
                "sha256": sums,
            },
        )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SparsightError(f"{target}: the checkpoint could not be written ({error}).") from error
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(folder: Path, sites: tuple[str, ...]) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones.

    Raises:
        SparsightError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    candidates = _found(folder)
    for path in reversed(candidates):
        try:
            return _read(path, sites), problems
        except SparsightError as error:
            problems.append(str(error))
    if candidates:
        raise SparsightError(
            f"{folder}: no checkpoint is whole. {' '.join(problems)} "
            "Remove the folder to train from the start."
        )
    return None, problems


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def _read(path: Path, sites: tuple[str, ...]) -> Checkpoint:
    state = read_json(path / _STATE)
    tensors = {}
    for site in sites:
        file = path / site / _TENSORS
        if not file.exists() or sha256_file(file) != state["sha256"].get(site):
            raise SparsightError(f"{file}: is missing or damaged (its checksum differs).")
        try:
            tensors[site] = load_file(file)
        except SafetensorError as error:
            raise SparsightError(f"{file}: cannot be read ({error}).") from error
    return Checkpoint(state["step"], state["cursor"], state["summed"], tensors)
