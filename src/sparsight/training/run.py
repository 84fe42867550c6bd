"""A run on disk."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.config import load
from sparsight.errors import SparsightError, UserError
from sparsight.files import lock, read_json, remove_temporaries
from sparsight.sae import SparseAutoencoder
from sparsight.sae.files import WEIGHTS
from sparsight.training.config import TrainConfig, TrainRecipe

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
DIVERGED = "diverged.json"
"""Of a member of a sweep whose loss ceased to be finite."""
SWEEP = "sweep.toml"
"""At the root of a sweep."""
LOCK = ".lock"
"""Held by the process that trains into the folder."""


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run: `out` itself for one site, `out/SITE` for each of several.

    Attributes:
        out: folder of the run.
        sites: the sites that were trained on.
    """

    out: Path
    sites: tuple[str, ...]

    def folder(self, site: str | None = None) -> Path:
        """Where a site's configuration, metrics and SAE lie.

        Raises:
            UserError: the run has no such site, or several and none is named.
        """
        if site is None and len(self.sites) > 1:
            raise UserError(f"{self.out} has several sites, name one of: {', '.join(self.sites)}.")
        if site is not None and site not in self.sites:
            raise UserError(f"{self.out} has no site {site!r}, only: {', '.join(self.sites)}.")
        return self.out if len(self.sites) == 1 else self.out / str(site)

    def is_finished(self, site: str) -> bool:
        """Whether a site's SAE is there."""
        return (self.folder(site) / WEIGHTS).exists()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    def claimed(self) -> AbstractContextManager[None]:
        """While it lasts no other process may train into the folder.

        Raises:
            UserError: another process does.
            SparsightError: the folder cannot be made or written.
        """
        return lock(self.out / LOCK, f"{self.out}: another process is training into it.")

    def clear_leftovers(self) -> None:
        """Remove what a process left that was killed in the moment when the run was finished."""
        folders = (self.out, self.checkpoints, *map(self.folder, self.sites))
        if (self.out / LOCK).exists() or any(any(each.glob(".*.tmp")) for each in folders):
            # Whoever holds the lock still clears up behind itself.
            with suppress(UserError), self.claimed():
                for folder in folders:
                    remove_temporaries(folder)

    @property
    def recipe(self) -> TrainRecipe:
        """Everything needed to repeat the run."""
        return load(TrainRecipe, self.folder(self.sites[0]) / CONFIG)

    @property
    def config(self) -> TrainConfig:
        """How it was trained."""
        return self.recipe.train

    def sae(self, site: str | None = None) -> SparseAutoencoder:
        """The trained SAE.

        Raises:
            UserError: training has not finished.
        """
        return SparseAutoencoder.from_pretrained(self.folder(site))

    def metrics(self, site: str | None = None) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return read_metrics(self.folder(site) / METRICS)


def diverged(folder: Path) -> str | None:
    """Why a member of a sweep has no SAE; None where it has one, or may still get one."""
    try:
        return str(read_json(folder / DIVERGED)["reason"])
    except (UserError, KeyError):  # not there, or damaged: then it trains again
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
        SparsightError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise SparsightError(f"{path}, line {number}: is not JSON ({error}).") from error
    return found
