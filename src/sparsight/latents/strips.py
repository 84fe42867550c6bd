"""`show_latent`: the strongest images of one latent as a strip, for a notebook or a file."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sparsight.config import check_positive
from sparsight.errors import UserError
from sparsight.figures import percent, rounded
from sparsight.files import check_file, write_bytes
from sparsight.latents.heatmaps import overlay
from sparsight.latents.index import LatentIndex
from sparsight.latents.seeing import see
from sparsight.pages.data_uris import encode_picture, is_crisp
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

SIDE, GAP = 128, 4
"""Side of an image in pixels."""


@dataclass(frozen=True)
class StripImage:
    """One image of a strip.

    Attributes:
        image: the image as the model saw it; with heatmaps, dark where the latent is not active.
        activation: the latent's strongest activation in it.
        about: its label, or else its id.
    """

    image: Image.Image
    activation: float
    about: str


@dataclass(frozen=True, repr=False)
class LatentStrip:
    """The images that activate one latent most, strongest first; notebooks show them.

    Attributes:
        latent: its number.
        title: number, name and density.
        images: the images, strongest first.
        notes: what could not be shown, and why.
    """

    latent: int
    title: str
    images: Sequence[StripImage]
    notes: tuple[str, ...] = ()

    def picture(self) -> Image.Image:
        """Join the images side by side into one, each scaled to a square of 128 pixels."""
        n = max(1, len(self.images))
        strip = Image.new("RGB", (n * (SIDE + GAP) - GAP, SIDE), "white")
        for place, each in enumerate(self.images):
            method = Image.Resampling.NEAREST if is_crisp(each.image) else Image.Resampling.LANCZOS
            scale = SIDE / max(each.image.size)
            size = [max(1, round(side * scale)) for side in each.image.size]
            scaled = each.image.resize((size[0], size[1]), method)
            left = place * (SIDE + GAP) + (SIDE - size[0]) // 2
            strip.paste(scaled, (left, (SIDE - size[1]) // 2))
        return strip

    def save(self, path: str | Path) -> Path:
        """Write the strip as a PNG.

        Raises:
            UserError: the path is a folder.
            SparsightError: the disk is full or the folder cannot be written.
        """
        path = Path(path)
        check_file(path)
        write_bytes(path, self._repr_png_())
        return path

    def __repr__(self) -> str:
        return f"LatentStrip({self.title}: {len(self.images)} images)"

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.picture().save(out, "PNG")
        return out.getvalue()

    def _repr_html_(self) -> str:
        cells = "".join(_cell(each) for each in self.images)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in dict.fromkeys(self.notes))
        return (
            f"<div><b>{html.escape(self.title)}</b></div>"
            f'<div style="display:flex;flex-wrap:wrap;gap:{GAP}px">{cells}</div>{notes}'
        )


def _cell(each: StripImage) -> str:
    crisp = ";image-rendering:pixelated" if is_crisp(each.image) else ""
    about = html.escape(each.about, quote=True)
    return (
        f'<figure style="margin:0;width:{SIDE}px;font-size:12px" title="{about}">'
        f'<img src="{encode_picture(each.image, SIDE)}" alt="{about}" style="width:{SIDE}px;'
        f'height:{SIDE}px;object-fit:contain{crisp}">'
        f'<figcaption style="overflow:hidden;text-overflow:ellipsis;white-space:nowrap">'
        f"{rounded(each.activation)} · {about}</figcaption></figure>"
    )


def show_latent(
    index: LatentIndex,
    latent: int,
    n: int = 8,
    *,
    sae: SparseAutoencoder | None = None,
    model: VisionModel | None = None,
) -> LatentStrip:
    """Make a strip of the images that activate a latent most, for a notebook.

    Args:
        index: of the SAE.
        latent: its number.
        n: largest number of images.
        sae: the SAE, with `model`, for heatmaps: images are dark where the latent is not active.
        model: the model with which the index was built.

    Raises:
        UserError: the latent does not exist, the SAE is not that of the index, or only one of `sae`
            and `model` is given.
    """
    check_positive(n=n)
    if (sae is None) != (model is None):
        raise UserError("Heatmaps need both sae and model; give both, or neither.")
    if sae is not None:
        index.check_sae(sae)
    examples = index.top(latent)[:n]
    wanted = {example.image: [latent] for example in examples}
    with progress("", None, "images", quiet=True) as line:
        seen = see(index, sae, model, wanted, line)
    peak = max((float(grid.max()) for grid in seen.grids.values()), default=0.0)
    images = []
    for example in examples:
        if example.image not in seen.pictures:
            continue
        image, info = seen.pictures[example.image], index.info(example.image)
        grid = seen.grids.get((example.image, latent))
        if grid is not None:
            image = overlay(image, grid, look="spotlight", peak=peak, min_size=SIDE)
        images.append(StripImage(image, example.activation, info.label or info.id))
    return LatentStrip(latent, _title(index, latent), images, tuple(seen.notes))


def _title(index: LatentIndex, latent: int) -> str:
    row = index.row(latent)
    name = f" · {row['name']}" if row["name"] is not None else ""
    if not row["n_active"]:
        return f"latent {latent}{name} · never active"
    density = f"active on {percent(row['density'])} of the vectors"
    return f"latent {latent}{name} · {density}, {row['n_active_images']:,} images"
