"""Checkpoints: everything that a run needs to continue as if it had never stopped.

`checkpoints/STEP/state.json` holds the step, the position in the data, the description of the run
(so that no other run continues from here) and checksums. Next to it there is one folder per site
(SITE; in a sweep NAME/SITE) with the SAE as `from_pretrained` reads it, the lines of
`metrics.jsonl` so far, and `training.safetensors`: optimiser, dead-latent counters, running sums,
the average of the weights. Random numbers depend only on seeds, so no random states are kept.
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
    """An intact checkpoint, read and checked.

    Attributes:
        step: number of steps that were done.
        cursor: position in the data, for the stream's `load_state_dict`.
        summed: number of vectors in each site's running sums.
        saes: for each site, the tensors of the SAE.
        tensors: for each site, the result of `SiteTraining.state`.
        runs: for each site, the description that identifies its run; None in checkpoints of earlier
            versions of Sparsight.
        logs: for each site, the lines of its `metrics.jsonl`; also None in checkpoints of earlier
            versions.
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
    """Write a checkpoint and remove the oldest ones, except for the last two.

    Args:
        folder: folder of all checkpoints.
        step: number of steps that were done.
        sites: the SAEs in training, by name.
        cursor: position in the data.
        identities: by name, the description that identifies a run.
        logs: by name, the path of `metrics.jsonl`.

    Raises:
        SparsightError: writing failed; earlier checkpoints are untouched.
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
    """Read the newest intact checkpoint; also return what is wrong with newer ones.

    Raises:
        UserError: a checkpoint has another version of the format.
        SparsightError: there are checkpoints, but none is intact.
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
    """Return the runs in the newest readable checkpoint, as the descriptions that identify them.

    A description is None in checkpoints of earlier versions of Sparsight. Empty if there is no
    checkpoint.
    """
    state = checkpoint_files.newest_state(folder)
    return {name: _run(state, name) for name in state.get("summed", {})}


def _run(state: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the description that identifies a run, with the keys of this version."""
    run: dict[str, Any] | None = state.get("runs", {}).get(name)
    if run is not None and isinstance(run.get("train"), dict):
        with suppress(UserError):  # if this version cannot express it, it is another run
            run = {**run, "train": with_remedy(run["train"], quiet=True)}
    return run


def _log(path: Path, name: str, state: Mapping[str, Any]) -> bytes | None:
    return (path / name).read_bytes() if name in state["sha256"] else None
