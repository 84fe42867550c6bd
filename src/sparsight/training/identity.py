"""Whether what is in a run's folder belongs to the run to train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparsight.config import first_difference, to_dict
from sparsight.errors import UserError
from sparsight.runs.same_run import damaged_if, refuse_difference
from sparsight.sae.files import FILES
from sparsight.training.config import TrainRecipe, stored_recipe
from sparsight.training.run import CONFIG, Run

HELD_OUT = ("held_out", "held_out_seed")
"""The fields of a recipe that determine which images are held out."""


def identity(recipe: TrainRecipe) -> dict[str, Any]:
    """Return what identifies a run: no folders, which may move; the fingerprint covers the data."""
    return to_dict(dataclasses.replace(recipe, out=Path(), store=None, model=None, images=None))


def holds_part(run: Run, recipe: TrainRecipe, begun: bool = False) -> bool:
    """Return whether part of the run exists already.

    Args:
        run: the run.
        recipe: its recipe.
        begun: whether a checkpoint has this recipe; a `config.toml` that contradicts it is damaged.

    Raises:
        UserError: the folder holds another run.
    """
    paths = [run.folder(site) / CONFIG for site in run.sites]
    present = [path for path in paths if path.exists()]
    with damaged_if(begun):
        _refuse_other_sites(run)
        for path in present:
            _refuse_other_run(path, recipe)
    if not present and not begun:
        for folder in map(run.folder, run.sites):
            _refuse_other_files(folder)
    return bool(present)


def _refuse_other_sites(run: Run) -> None:
    """Raise a `UserError` if the folder holds a run of other sites, which share its checkpoints."""
    for path in (run.out / CONFIG, *run.out.glob(f"*/{CONFIG}")):
        if not path.exists():
            continue
        sites = stored_recipe(path).sites
        places = [run.out] if len(sites) == 1 else [run.out / site for site in sites]
        if path.parent in places and set(sites) != set(run.sites):
            raise UserError(
                f"{path}: belongs to a run on {', '.join(sites)}. Choose another folder, or remove "
                "this one."
            )


def _refuse_other_run(path: Path, recipe: TrainRecipe) -> None:
    there, own = identity(stored_recipe(path)), identity(recipe)
    if any(there.get(key) != own.get(key) for key in HELD_OUT):  # so the activations differ, too
        there, own = ({key: each.get(key) for key in HELD_OUT} for each in (there, own))
    field = first_difference(there, own)
    if field == "activations":
        raise UserError(
            f"{path}: belongs to a run on other activations: the model's weights, the "
            "preprocessing, the images or their selection differ. Choose another folder, or "
            "remove this one."
        )
    refuse_difference(path, there, own)


def _refuse_other_files(folder: Path) -> None:
    """Raise a `UserError` if a folder without a run holds files that a run would overwrite."""
    for name in ("manifest.json", *FILES):
        if (folder / name).exists():
            raise UserError(
                f"{folder}: holds {name} of something other than a run. Choose another folder."
            )
