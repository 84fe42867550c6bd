"""A run on disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json
from sparsight.notebooks import data_frame
from sparsight.runs import checkpoint_files
from sparsight.runs.folder import RunFolder
from sparsight.sae import SparseAutoencoder
from sparsight.sae.files import WEIGHTS
from sparsight.training.config import TrainConfig, TrainRecipe, stored_recipe

if TYPE_CHECKING:
    import pandas

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
DIVERGED = "diverged.json"
"""File that replaces the SAE of a sweep's member whose loss became infinite or NaN."""
SWEEP = "sweep.toml"
"""File at the root of a sweep."""
WANDB_ID = "wandb-id.txt"

WRITTEN = (CONFIG, METRICS, DIVERGED, WANDB_ID, WEIGHTS, "config.json", "README.md")
"""Files that training writes into an SAE's folder; other verbs may be writing the others."""
_OWN = ("checkpoints", METRICS, DIVERGED, WANDB_ID, "tensorboard", "wandb")
"""What a run may leave before it writes its `config.toml`, or after that file is removed."""


@dataclass(frozen=True)
class Run(RunFolder):
    """A finished or unfinished run: `out` itself for one site, `out/SITE` for each of several.

    Attributes:
        out: folder of the run.
        sites: the sites to train on.
    """

    sites: tuple[str, ...]

    def folder(self, site: str | None = None) -> Path:
        """Return the folder of a site's configuration, metrics and SAE.

        Raises:
            UserError: the run does not have this site, or has several and none is named.
        """
        if site is None and len(self.sites) > 1:
            raise UserError(f"{self.out} has several sites; name one of {', '.join(self.sites)}.")
        if site is not None and site not in self.sites:
            raise UserError(f"{self.out} has no site {site!r}; it has {', '.join(self.sites)}.")
        return self.out if len(self.sites) == 1 else self.out / str(site)

    def is_finished(self, site: str) -> bool:
        """Return whether a site's SAE exists."""
        return (self.folder(site) / WEIGHTS).exists()

    def written(self) -> list[tuple[Path, Collection[str]]]:
        """Return the folders of SAEs and checkpoints, with the files that training writes."""
        folders = [(self.folder(site), WRITTEN) for site in self.sites]
        return [*folders, (self.checkpoints, checkpoint_files.PARTIAL)]

    @property
    def recipe(self) -> TrainRecipe:
        """Everything needed to repeat the run."""
        return stored_recipe(self.folder(self.sites[0]) / CONFIG)

    @property
    def config(self) -> TrainConfig:
        """How the run trains."""
        return self.recipe.train

    def sae(self, site: str | None = None) -> SparseAutoencoder:
        """Load the trained SAE.

        Raises:
            UserError: training has not finished.
        """
        return SparseAutoencoder.from_pretrained(self.folder(site))

    def metrics(self, site: str | None = None) -> list[dict[str, Any]]:
        """Read the lines of `metrics.jsonl`."""
        return read_metrics(self.folder(site) / METRICS)

    def to_pandas(self, site: str | None = None) -> pandas.DataFrame:
        """Return `metrics` as a pandas data frame, one row per line of the log.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return data_frame(self.metrics(site))


def goes_on(out: Path, has_part: bool, resume: bool) -> bool:
    """Return whether a run continues from what is in its folder, rather than begins.

    Args:
        out: the folder.
        has_part: whether part of this run is in the folder.
        resume: whether it may continue.

    Raises:
        UserError: it may not continue, or the folder holds something else.
    """
    if not has_part:
        refuse_foreign_files(out)
    elif not resume:
        raise UserError(f"{out} already holds a run. Choose another folder, or resume the run.")
    return has_part


def refuse_foreign_files(out: Path) -> None:
    """Check that a folder in which no run has begun is free for one.

    It may contain other runs, each in its own folder, and hidden files.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if not out.exists() or checkpoint_files.newest(out / "checkpoints") is not None:
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file. Choose another folder for the run.")
    strange = [
        path.name
        for path in sorted(out.iterdir())
        if not (path.name.startswith(".") or path.name in _OWN or _holds_runs(path))
    ]
    if strange:
        shown = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise UserError(
            f"{out}: holds other files ({shown}) and no run. Choose an empty or new folder."
        )


def _holds_runs(path: Path) -> bool:
    """Return whether a folder holds only hidden files, or a run, runs or a sweep."""
    if not path.is_dir():
        return False
    signs = (CONFIG, SWEEP, WEIGHTS)
    inside = (path.glob(f"{depth}{sign}") for depth in ("", "*/") for sign in signs)
    return any(any(paths) for paths in inside) or all(
        entry.name.startswith(".") for entry in path.iterdir()
    )


def unfinished(folder: Path) -> list[str]:
    """Find unfinished training in a folder of one or more runs or sweeps.

    Returns:
        A sentence per run or sweep: its progress, and the command that continues it.
    """
    sentences: dict[Path, str] = {}
    for path in sorted({*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}"),
                        *folder.glob(f"*/*/{CONFIG}")}):  # fmt: skip
        own = path.parent
        if (own / WEIGHTS).exists() or diverged(own) is not None:
            continue
        try:
            recipe = stored_recipe(path)
        except UserError:
            continue  # belongs to something else
        roots = (own, own.parent, own.parent.parent)
        swept = next((parent for parent in roots[1:] if (parent / SWEEP).exists()), None)
        root = swept or (own if len(recipe.sites) == 1 else own.parent)
        verb, file = ("sweep", root / SWEEP) if swept else ("train", path)
        length, size = recipe.train.length, recipe.train.batch_size
        done = min(length, checkpoint_files.newest_step(root / "checkpoints") * size)
        sentences.setdefault(
            root,
            f"{root}: training is unfinished: {done:,} of {length:,} vectors. To continue, repeat "
            f"the same command, or run `sparsight {verb} --config {shlex.quote(str(file))} --out "
            f"{shlex.quote(str(root))}`.",
        )
    return list(sentences.values())


def diverged(folder: Path) -> str | None:
    """Return why a member of a sweep has no SAE; None if it has one, or can still get one."""
    try:
        return str(read_json(folder / DIVERGED)["reason"])
    except (UserError, KeyError):  # missing, or damaged: it then trains again
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, except for an incomplete last line.

    Raises:
        SparsightError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise SparsightError(f"{path}, line {number}: is not JSON ({error}).") from error
    return metrics
