"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/STEP/state.json` holds the step, the position in the data, what the run is (so that no
other one goes on from here) and checksums; beside it, a folder per site (SITE; in a sweep
NAME/SITE) with the SAE as `from_pretrained` reads it, the lines of `metrics.jsonl` so far, and
`training.safetensors`: optimiser, dead-latent counters, running figures, the average of the
weights. Random numbers are drawn from seeds alone, so that there are no random states to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsight.errors import UserError
from sparsight.files import write_bytes
from sparsight.runs import checkpoint_files
from sparsight.runs.checkpoint_files import newest, newest_step
from sparsight.sae.files import WEIGHTS
from sparsight.tensor_files import read_safetensors, write_safetensors
from sparsight.training.old_keys import with_remedy
from sparsight.training.run import METRICS
from sparsight.training.site import SiteTraining

__all__ = ["Checkpoint", "identities", "load_latest", "newest", "newest_step", "save"]

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
        runs: for each site what makes its run the same run; None in checkpoints of earlier
            versions of Sparsight.
        logs: for each site the lines of its `metrics.jsonl`; None in checkpoints of earlier
            versions, too.
    """

    step: int
    cursor: dict[str, Any]
    summed: dict[str, int]
    saes: dict[str, dict[str, Tensor]]
    tensors: dict[str, dict[str, Tensor]]
    runs: dict[str, dict[str, Any] | None]
    logs: dict[str, bytes | None]


def save(
    folder: Path,
    step: int,
    sites: Mapping[str, SiteTraining],
    cursor: Mapping[str, Any],
    identities: Mapping[str, Any],
    logs: Mapping[str, Path],
) -> Path:
    """Write a checkpoint and drop the oldest beyond the last two.

    Args:
        folder: of all checkpoints.
        step: steps that were done.
        sites: what trains, by name.
        cursor: position in the data.
        identities: by name, what makes a run the same run.
        logs: by name, the `metrics.jsonl`.

    Raises:
        SparsightError: it could not be written; earlier ones are untouched.
    """

    def write_files(partial: Path) -> list[str]:
        for site, training in sites.items():
            training.sae.save_pretrained(partial / site)
            write_safetensors(training.state(), partial / site / _TENSORS)
            lines = logs[site].read_bytes() if logs[site].exists() else b""
            write_bytes(partial / site / METRICS, lines)
        return [f"{site}/{name}" for site in sites for name in (WEIGHTS, _TENSORS, METRICS)]

    state = {
        "cursor": dict(cursor),
        "summed": {site: training.summed for site, training in sites.items()},
        "runs": {site: identities[site] for site in sites},
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
            {site: read_safetensors(path / site / WEIGHTS) for site in sites},
            {site: read_safetensors(path / site / _TENSORS) for site in sites},
            {site: _run(state, site) for site in sites},
            {site: _log(path, f"{site}/{METRICS}", state) for site in sites},
        )

    return checkpoint_files.read_latest(folder, read)


def identities(folder: Path) -> dict[str, Any]:
    """What trains in the newest checkpoint that can be read, by name, and which run each is of.

    A run is None in checkpoints of earlier versions of Sparsight. Nothing where there is no
    checkpoint.
    """
    state = checkpoint_files.newest_state(folder)
    return {name: _run(state, name) for name in state.get("summed", {})}


def _run(state: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What makes a run the same run, in the words of this version."""
    run: dict[str, Any] | None = state.get("runs", {}).get(name)
    if run is not None and isinstance(run.get("train"), dict):
        with suppress(UserError):  # what cannot be had now is another run
            run = {**run, "train": with_remedy(run["train"], quiet=True)}
    return run


def _log(path: Path, name: str, state: Mapping[str, Any]) -> bytes | None:
    return (path / name).read_bytes() if name in state["sha256"] else None
