"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/STEP/state.json` holds the step, the position in the data and a checksum of each file;
beside it, a folder a site (SITE; in a sweep NAME/SITE) with the SAE as `from_pretrained` reads it
and `training.safetensors`: optimiser, dead-latent counters, running figures, the average of the
weights. Random numbers are drawn from seeds alone, so that there are no random states to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsight.errors import UserError
from sparsight.files import read_json
from sparsight.sae.files import WEIGHTS, load_tensors, save_tensors
from sparsight.training import checkpoint_files
from sparsight.training.checkpoint_files import newest
from sparsight.training.site import SiteTraining

__all__ = ["Checkpoint", "load_latest", "members", "newest", "save"]

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

    def write_files(partial: Path) -> list[str]:
        for site, training in sites.items():
            training.sae.save_pretrained(partial / site)
            save_tensors(training.state(), partial / site / _TENSORS)
        return [f"{site}/{name}" for site in sites for name in (WEIGHTS, _TENSORS)]

    state = {
        "cursor": dict(cursor),
        "summed": {site: training.summed for site, training in sites.items()},
    }
    return checkpoint_files.write(folder, step, state, write_files)


def load_latest(folder: Path, sites: tuple[str, ...]) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones.

    Raises:
        UserError: one that is looked at is of another version of the format.
        SparsightError: there are checkpoints, and none is whole.
    """

    def read(path: Path, state: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            state["step"],
            state["cursor"],
            {site: state["summed"][site] for site in sites},
            {site: load_tensors(path / site / WEIGHTS) for site in sites},
            {site: load_tensors(path / site / _TENSORS) for site in sites},
        )

    return checkpoint_files.read_latest(folder, read)


def members(folder: Path) -> frozenset[str]:
    """What the newest checkpoint that can be read holds; nothing where there is none."""
    for path in reversed(checkpoint_files.found(folder)):
        try:
            return frozenset(read_json(path / checkpoint_files.STATE)["summed"])
        except (UserError, KeyError, TypeError):
            continue  # `load_latest` tells of it
    return frozenset()
