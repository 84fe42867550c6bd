"""Make the pictures of the tutorial "CLIP with text" out of the folder in which it was run.

    python -m tools.clip_pictures FOLDER

FOLDER holds what the tutorial's commands leave: `runs/words` and `attack/`. The same folder gives
the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

import sparsight as sp
from sparsight.attacks import AttackPairs, SalienceTable
from sparsight.latents import overlay, patch_heatmaps, seen_pictures

OUT = Path(__file__).parent.parent / "docs" / "pictures"
IMAGES = "calibration:400:2:single"
TILE, GAP, HEAD, EDGE = 150, 10, 34, 16
PANEL, INK = (17, 20, 25), (236, 233, 228)
HEADS = ("clean", "attacked", "same word", "nonsense")


def make(folder: Path, out: Path = OUT) -> list[Path]:
    """Write both pictures of the tutorial.

    Args:
        folder: in which the tutorial's commands were run.
        out: gets the pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = sp.make_pairs(sp.open_images(IMAGES))
    written = {
        "clip-kinds.webp": kinds(pairs),
        "clip-word-latents.webp": word_latents(folder, pairs),
    }
    for name, picture in written.items():
        picture.save(out / name, quality=88, method=6)
    return [out / name for name in written]


def kinds(pairs: AttackPairs, rows: int = 3) -> Image.Image:
    """The first scenes of the attack set, each as it is and with a word, in four columns."""
    sources = (pairs.clean, pairs.attacked, pairs.same, pairs.control)
    return grid(HEADS, [[source.load(row) for source in sources] for row in range(rows)])


def word_latents(folder: Path, pairs: AttackPairs, columns: int = 4, rows: int = 3) -> Image.Image:
    """For the latents with the largest effect, attacked scenes, lit where the latent is active."""
    table = SalienceTable.load(folder / "attack" / "blocks.2.resid_post")
    sae = sp.SparseAutoencoder.from_pretrained(folder / "runs" / "words")
    model = sp.load_model("calibration")
    latents = list(table.selective)[:columns]
    pixels = torch.stack([model.transform(pairs.attacked.load(i)) for i in range(len(pairs))])
    heat = patch_heatmaps(sae, model, pixels, latents)
    pictures = seen_pictures(model, pixels)
    shown = []
    for column in range(len(latents)):
        strongest = heat[:, column].amax((1, 2)).argsort(descending=True)[:rows].tolist()
        peak = float(heat[:, column].max())
        shown.append(
            [
                overlay(pictures[i], heat[i, column], look="spotlight", peak=peak, min_size=TILE)
                for i in strongest
            ]
        )
    heads = [f"latent {latent}" for latent in latents]
    return grid(heads, [list(row) for row in zip(*shown, strict=True)])


def grid(heads: list[str] | tuple[str, ...], rows: list[list[Image.Image]]) -> Image.Image:
    """Images in rows and columns, with a word above each column."""
    width = 2 * EDGE + len(heads) * (TILE + GAP) - GAP
    panel = Image.new("RGB", (width, 2 * EDGE + HEAD + len(rows) * (TILE + GAP) - GAP), PANEL)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 17)
    for x, head in enumerate(heads):
        left = EDGE + x * (TILE + GAP)
        draw.text((left + TILE / 2, EDGE + 10), head, INK, font, anchor="mm")
        for y, row in enumerate(rows):
            tile = row[x].convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
            panel.paste(tile, (left, EDGE + HEAD + y * (TILE + GAP)))
    return panel


if __name__ == "__main__":
    for path in make(Path(sys.argv[1])):
        print(f"{path}: {path.stat().st_size:,} bytes")
