"""Make the picture of the guide to `visualize` from visualisations that were saved.

    sparsight visualize runs/dino-l8 3155 3445 331 2121
    sparsight visualize runs/dino-l8 3155 3445 331 2121 --recipe pixels
    python -m tools.visualisation_pictures runs/dino-l8/visualisations

Each row is a recipe, each column a latent. The images are made by the optimiser alone, so that no
photo is shown.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from sparsight.files import read_json, write_bytes
from sparsight.visualisation.result import ABOUT

OUT = Path(__file__).parent.parent / "docs" / "pictures" / "visualisations.webp"
MOST_BYTES = 28_000
TILE, GAP = 192, 6


@dataclass(frozen=True)
class Options:
    """Put saved visualisations side by side."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders with one sub-folder per visualisation."""

    recipes: tuple[str, ...] = ("maco", "pixels")
    """Recipes, one per row."""

    latents: tuple[int, ...] = ()
    """Latents, one per column; default: those that every recipe has, in order."""

    out: Path = OUT
    """The picture, a WebP."""


def main(options: Options) -> None:
    """Read, arrange, write."""
    shown: dict[tuple[str, int], Image.Image] = {}
    for folder in options.folders:
        for about in sorted(folder.glob(f"*/{ABOUT}")):
            found = read_json(about)
            key = (found["settings"]["recipe"], found["latent"])
            shown[key] = Image.open(about.parent / "0.png").convert("RGB")
    rows = [{latent for recipe, latent in shown if recipe == row} for row in options.recipes]
    latents = options.latents or sorted(set.intersection(*rows))
    sheet = Image.new(
        "RGB",
        (len(latents) * (TILE + GAP) - GAP, len(rows) * (TILE + GAP) - GAP),
        (17, 20, 25),
    )
    for y, recipe in enumerate(options.recipes):
        for x, latent in enumerate(latents):
            tile = shown[recipe, latent].resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x * (TILE + GAP), y * (TILE + GAP)))
    for quality in range(90, 4, -4):
        out = io.BytesIO()
        sheet.save(out, "WEBP", quality=quality, method=6)
        if out.tell() <= MOST_BYTES:
            break
    write_bytes(options.out, out.getvalue())
    print(f"{options.out}: {out.tell():,} bytes, latents {', '.join(map(str, latents))}")


if __name__ == "__main__":
    main(tyro.cli(Options))
