"""`sparsight attack curate`: write the images that most activate what `attack find` found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.attacks import SalienceTable, curate
from sparsight.attacks.curating import SENTENCE, Captions
from sparsight.cli.attack.shared import model_of, target_of
from sparsight.cli.help import Help
from sparsight.cli.options import ModelOptions, parse
from sparsight.cli.printing import print_notes
from sparsight.images import open_images

HELP = Help(
    examples=("attack/blocks.9.resid_post --images photos/ --out attack-set/",),
    needed=("found", "images", "out"),
)


@dataclass(frozen=True)
class CurateOptions(ModelOptions):
    """Write the images that most activate the latents or neurons that `attack find` found.

    The result is a folder of images with captions, and a tar file.
    """

    found: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Folders that `attack find` wrote."""

    images: str = tyro.MISSING
    """Images to choose from, in any form that `extract` takes."""

    out: Path = Path("attack-set")
    """Folder to write; it must not exist yet."""

    model: str | None = None
    """Vision model; default: the model in which the latents were found."""

    n: int = 200
    """Number of images to keep."""

    captions: Captions = "labels"
    """own: the images' own captions. labels: their labels in a sentence. zero-shot: the likeliest
    class in a sentence. opinion: the words closest to the image, found by gradient ascent."""

    sentence: str = SENTENCE
    """Sentence for labels and classes; {} stands for the name."""

    classes: tuple[str, ...] = ()
    """Classes for zero-shot captions; default: the labels of the images."""

    words: int = 4
    """Number of words in an opinion caption."""

    selectivity: float | None = None
    """Score images by latents or neurons with at least this selectivity; default: as in `attack
    find`."""

    seed: int = 0
    """Seed of the search for opinions."""

    batch_images: int = 64
    """Images per batch."""


def main(arguments: Sequence[str]) -> None:
    """Parse, choose, write, print a summary."""
    options = parse(CurateOptions, "attack curate", arguments, helped=HELP)
    tables = [SalienceTable.load(folder) for folder in options.found]
    model = model_of(options, options.model, tables)
    source = open_images(options.images, table=options.table)
    print_notes(source.notes)
    chosen = curate(
        model,
        source,
        [target_of(table, options.selectivity, options.device) for table in tables],
        options.out,
        n=options.n,
        captions=options.captions,
        sentence=options.sentence,
        class_names=options.classes or None,
        words=options.words,
        max_failed=options.max_failed,
        seed=options.seed,
        batch_size=options.batch_images,
        workers=options.workers,
        quiet=False,
    )
    if chosen.failed:
        print_notes([f"{chosen.failed:,} images could not be loaded."])
    print(
        f"{chosen.folder}: {chosen.n:,} of {chosen.n_seen:,} images, scores {chosen.highest:.2f} "
        f"to {chosen.lowest:.2f}"
    )
