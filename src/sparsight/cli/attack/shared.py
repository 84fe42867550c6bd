"""What the verbs of `attack` share: pictures that are written on, models, what was found."""

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
    """Pictures and what is written on them."""

    images: str = tyro.MISSING
    """Pictures with labels, in any form that `extract` takes."""

    model: str | None = None
    """Vision model with a text tower; default the one that latents were found in."""

    n: int | None = None
    """So many pictures, chosen at random; default all."""

    seed: int = 0
    """Of words, places, choice of pictures and random latents."""

    classes: tuple[str, ...] = ()
    """Class names, if not those of the pictures' labels."""

    templates: str = "simple"
    """Sentences for zero-shot classification: simple, openai80, or one with {} in it."""

    writing: Literal["auto", "text", "world"] = "auto"
    """text: in the style below. world: on the calibration world's own band. auto: world on
    calibration scenes, text on other pictures."""

    style: TextStyle = field(default_factory=TextStyle)
    """How words look."""

    nonsense: Nonsense = "letters"
    """Of control pictures: letters as often as class names have them, or an anagram of the word."""

    batch_images: int = 64
    """Images at a time."""


def model_of(
    options: ModelOptions, named: str | None, tables: Sequence[SalienceTable]
) -> VisionModel:
    """The model that was named, else the one that latents were found in.

    Raises:
        UserError: it is not known which, or what was found belongs to another.
    """
    ids = {str(table.about["model"]) for table in tables}
    if named is None and len(ids) != 1:
        raise UserError("Which model? Name it with --model.")
    model = open_model(named or ids.pop(), options)
    for table in tables:
        if table.about["weights_hash"] != model.weights_hash:
            raise UserError(
                f"{table.site}: what responds to words was found in {table.about['model']} "
                f"(weights {table.about['weights_hash'][:8]}), this is {model.id} (weights "
                f"{model.weights_hash[:8]}). Find it anew."
            )
    return model


def pairs_of(options: PairOptions) -> AttackPairs:
    """The pictures that were named, and how they are written on."""
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
    """What a table found, to be switched off.

    Raises:
        UserError: the SAE of these latents is not known, or not there.
    """
    sae = None
    if table.about["unit"] == "latent":
        folder = table.about.get("sae_folder")
        if folder is None:
            raise UserError(
                f"{table.site}: the table does not say where the SAE of these latents is; only "
                "tables that `sparsight attack find` wrote do. Use causal_check in Python."
            )
        if not Path(folder).is_dir():
            raise UserError(
                f"{table.site}: the SAE of these latents was at {folder}, and is not there now."
            )
        (sae,) = open_saes([Path(folder)], device).values()
    chosen = None if selectivity is None else table.select(selectivity=selectivity)
    return Target(table, chosen, sae, Off())


def check_failed(failed: dict[str, int], n: int, allowed: float) -> None:
    """Tell of pictures that did not load; stop if they are many.

    Raises:
        UserError: a larger share than `allowed` failed.
    """
    for kind, count in failed.items():
        print(f"note: {count:,} of {n:,} {kind} pictures did not load; left out.", file=sys.stderr)
    worst = max(failed.values(), default=0)
    if worst > allowed * n:
        raise UserError(
            f"{worst:,} of {n:,} pictures did not load, more than {allowed:.1%} (--max-failed)."
        )
