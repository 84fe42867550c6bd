"""A run on disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsight.config import load
from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json
from sparsight.notebooks import data_frame
from sparsight.runs import checkpoint_files
from sparsight.runs.folder import RunFolder
from sparsight.sae import SparseAutoencoder
from sparsight.sae.files import WEIGHTS
from sparsight.training.config import TrainConfig, TrainRecipe

if TYPE_CHECKING:
    import pandas

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
DIVERGED = "diverged.json"
"""Of a member of a sweep whose loss ceased to be finite."""
SWEEP = "sweep.toml"
"""At the root of a sweep."""
WANDB_ID = "wandb-id.txt"

WRITTEN = (CONFIG, METRICS, DIVERGED, WANDB_ID, WEIGHTS, "config.json", "README.md")
"""What training writes into the folder of an SAE; other verbs may be at work on the others."""
_OWN = ("checkpoints", METRICS, DIVERGED, WANDB_ID, "tensorboard", "wandb")
"""What a run may have left before, or behind, its `config.toml`."""


@dataclass(frozen=True)
class Run(RunFolder):
    """A finished or unfinished run: `out` itself for one site, `out/SITE` for each of several.

    Attributes:
        out: folder of the run.
        sites: the sites that were trained on.
    """

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

    def written(self) -> list[tuple[Path, Collection[str]]]:
        """The folders of the SAEs and the checkpoints, with what training writes there."""
        folders = [(self.folder(site), WRITTEN) for site in self.sites]
        return [*folders, (self.checkpoints, checkpoint_files.PARTIAL)]

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

    def to_pandas(self, site: str | None = None) -> pandas.DataFrame:
        """What `metrics` gives as a data frame of pandas: one row per line of the log.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return data_frame(self.metrics(site))


def goes_on(out: Path, has_part: bool, resume: bool) -> bool:
    """Whether a run goes on with what is in its folder, or begins there.

    Args:
        out: the folder.
        has_part: whether a part of this run is there.
        resume: whether it may go on.

    Raises:
        UserError: it may not, or the folder holds something else.
    """
    if not has_part:
        refuse_foreign_files(out)
    elif not resume:
        raise UserError(f"{out} holds a run already. Choose another folder, or resume it.")
    return has_part


def refuse_foreign_files(out: Path) -> None:
    """Make sure that a folder in which no run has begun is free for one.

    Other runs may lie in it, each in its own folder, and hidden files.

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
            f"{out}: holds other files ({shown}) and no run. Choose an empty or a new folder."
        )


def _holds_runs(path: Path) -> bool:
    """Whether a folder is empty but for hidden files, or that of runs or a sweep."""
    if not path.is_dir():
        return False
    signs = (CONFIG, SWEEP, WEIGHTS)
    inside = (path.glob(f"{depth}{sign}") for depth in ("", "*/") for sign in signs)
    return any(any(each) for each in inside) or all(
        each.name.startswith(".") for each in path.iterdir()
    )


def unfinished(folder: Path) -> list[str]:
    """What is still to be trained in a folder of a run, of a sweep, or of several of them.

    Returns:
        A sentence for each run or sweep: how far it is, and the command that goes on.
    """
    found: dict[Path, str] = {}
    for path in sorted({*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}"),
                        *folder.glob(f"*/*/{CONFIG}")}):  # fmt: skip
        own = path.parent
        if (own / WEIGHTS).exists() or diverged(own) is not None:
            continue
        try:
            recipe = load(TrainRecipe, path)
        except UserError:
            continue  # of something else
        roots = (own, own.parent, own.parent.parent)
        swept = next((each for each in roots[1:] if (each / SWEEP).exists()), None)
        root = swept or (own if len(recipe.sites) == 1 else own.parent)
        verb, file = ("sweep", root / SWEEP) if swept else ("train", path)
        length, size = recipe.train.length, recipe.train.batch_size
        done = min(length, checkpoint_files.newest_step(root / "checkpoints") * size)
        found.setdefault(
            root,
            f"{root}: training is unfinished: {done:,} of {length:,} vectors. The same command "
            f"goes on, or `sparsight {verb} --config {shlex.quote(str(file))} --out "
            f"{shlex.quote(str(root))}`.",
        )
    return list(found.values())


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
