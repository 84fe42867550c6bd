"""What the verbs of `attack` share: images with words on them, models, tables of what was found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from sparsight.attacks import (
    AttackPairs,
    SalienceTable,
    Target,
    TextStyle,
    WorldBand,
    make_pairs,
)
from sparsight.cli.opening import open_model, open_saes
from sparsight.cli.options import ModelOptions
from sparsight.cli.printing import print_notes
from sparsight.editing.actions import Off
from sparsight.errors import UserError
from sparsight.images import open_images
from sparsight.images.writing import Nonsense
from sparsight.vision import VisionModel


@dataclass(frozen=True)
class PairOptions(ModelOptions):
    """Images and what is written on them."""

    images: str = tyro.MISSING
    """Images with labels, in any form that `extract` takes."""

    model: str | None = None
    """Vision model with a text tower; default: the model in which the latents were found."""

    n: int | None = None
    """Number of images, chosen at random; default: all."""

    seed: int = 0
    """Seed of the words and their places, the choice of images, and the random latents."""

    classes: tuple[str, ...] = ()
    """Class names; default: the labels of the images."""

    templates: str = "simple"
    """Sentences for zero-shot classification: simple, openai80, or your own with {} in it."""

    writing: Literal["auto", "text", "world"] = "auto"
    """text: words in the style set with --style. world: words on the calibration world's own band.
    auto: world for calibration scenes, text for other images."""

    style: TextStyle = field(default_factory=TextStyle)
    """The look of the words."""

    nonsense: Nonsense = "letters"
    """Text on control images. letters: random letters, as frequent as in class names; anagram: the
    word's letters, shuffled."""

    batch_images: int = 64
    """Images per batch."""


def model_of(
    options: ModelOptions, named: str | None, tables: Sequence[SalienceTable]
) -> VisionModel:
    """Load the named model, or else the one in which the latents were found.

    Raises:
        UserError: the model is not known, or a table belongs to another model.
    """
    ids = {str(table.about["model"]) for table in tables}
    if named is None and len(ids) != 1:
        raise UserError("The model is not known; name it with --model.")
    model = open_model(named or ids.pop(), options)
    for table in tables:
        if table.about["weights_hash"] != model.weights_hash:
            raise UserError(
                f"{table.site}: the table was made with {table.about['model']} (weights "
                f"{table.about['weights_hash'][:8]}), but this is {model.id} (weights "
                f"{model.weights_hash[:8]}). Run `sparsight attack find` on this model."
            )
    return model


def pairs_of(options: PairOptions) -> AttackPairs:
    """Open the named images, with what is written on them."""
    source = open_images(options.images, table=options.table)
    style: TextStyle | WorldBand | None = options.style
    if options.writing == "world":
        style = WorldBand()
    elif options.writing == "auto" and options.style == TextStyle():
        style = None
    pairs = make_pairs(
        source,
        options.classes or None,
        style,
        n=options.n,
        seed=options.seed,
        nonsense=options.nonsense,
    )
    print_notes(pairs.notes)
    return pairs


def target_of(table: SalienceTable, selectivity: float | None, device: str | None) -> Target:
    """Return what a table found, to switch it off.

    Raises:
        UserError: the SAE of these latents is not known, or does not exist.
    """
    sae = None
    if table.about["unit"] == "latent":
        folder = table.about.get("sae_folder")
        if folder is None:
            raise UserError(
                f"{table.site}: the table does not name the SAE of these latents; only tables that "
                "`sparsight attack find` wrote do. Use causal_check in Python."
            )
        if not Path(folder).is_dir():
            raise UserError(
                f"{table.site}: the SAE of these latents was in {folder}, which no longer exists."
            )
        (sae,) = open_saes([Path(folder)], device).values()
    chosen = None if selectivity is None else table.select(selectivity=selectivity)
    return Target(table, chosen, sae, Off())


def check_failed(failed: dict[str, int], n: int, allowed: float) -> None:
    """Report images that could not be loaded; stop if there are too many.

    Raises:
        UserError: a larger share than `allowed` failed.
    """
    for kind, count in failed.items():
        print(
            f"note: {count:,} of {n:,} {kind} images could not be loaded and were left out.",
            file=sys.stderr,
        )
    worst = max(failed.values(), default=0)
    if worst > allowed * n:
        raise UserError(
            f"{worst:,} of {n:,} images could not be loaded, more than {allowed:.1%} "
            "(--max-failed)."
        )
