"""The report's cards of single latents: which latents, with which images and heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from sparsight.errors import UserError
from sparsight.latents.heatmaps import has_heatmaps, heat_image, patch_heatmaps, seen_pictures
from sparsight.latents.index import Example, LatentIndex
from sparsight.latents.stored import Heat, StoredCodes, stored_heatmaps
from sparsight.pages.data_uris import png_uri
from sparsight.progress import ProgressLine
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.geometry import seen_picture

TOP_SHOWN = 8
SAMPLES_PER_BAND = 2
LARGEST = 192
_BATCH = 32


@dataclass(frozen=True)
class Shot:
    """One example on a card."""

    picture: str
    """Key into `Gallery.pictures`; empty if the image could not be loaded."""
    heat: str
    """Data URI of the heatmap layer; empty if there is none."""
    activation: float
    caption: str
    """Label or id, for tooltips and screen readers."""
    prefix: bool
    """Whether the strongest token is CLS or a register, not a patch."""


@dataclass(frozen=True)
class Card:
    """One latent: its row of the index, its strongest images, and samples by quantile."""

    latent: int
    chosen: str
    row: Mapping[str, object]
    top: list[Shot]
    bands: list[tuple[str, list[Shot]]]


@dataclass
class Gallery:
    """The cards of a run and the images that they share, each encoded once."""

    how_chosen: str
    """A sentence that says how the latents were chosen."""
    cards: list[Card] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """Images by key, none larger than `LARGEST` pixels."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""


def choose_latents(
    index: LatentIndex, n: int, seed: int, *, named: int | None = None, least_images: int = 1
) -> tuple[list[tuple[int, str]], str]:
    """Choose up to `n` latents: some by the score of their names, one per name; the rest at random.

    Args:
        index: of the SAE.
        n: number of latents.
        seed: seed of the random choice.
        named: largest number chosen by name; default: half.
        least_images: number of images that must activate a latent.

    Returns:
        Latents with "named" or "random", and a sentence that says how they were chosen.
    """
    rows = index.table.select(["latent", "n_active_images", "name", "name_score"]).to_pylist()
    rows = [row for row in rows if row["n_active_images"] >= least_images]
    alive = [row["latent"] for row in rows]
    best: dict[str, tuple[float, int]] = {}
    for row in rows:
        if row["name"] is not None:
            score = (row["name_score"] or 0.0, -row["latent"])
            best[row["name"]] = max(best.get(row["name"], score), score)
    most = n // 2 if named is None else min(n, named)
    by_name = [-latent for _, latent in sorted(best.values(), reverse=True)][:most]
    rest = [latent for latent in alive if latent not in set(by_name)]
    drawn = np.random.default_rng(seed).permutation(len(rest))[: n - len(by_name)]
    random = sorted(rest[i] for i in drawn)
    how = (
        f"{len(random)} drawn at random (seed {seed}) from the "
        f"{len(rest):,} {'other ' if by_name else ''}latents that "
        + ("were ever active" if least_images == 1 else f"{least_images} images or more activate")
    )
    if by_name:
        first = f"{len(by_name)} with the highest-scoring names, one latent per name"
        how = f"{first}, and {how}" if random else first
    chosen = [(latent, "named") for latent in by_name] + [(latent, "random") for latent in random]
    return chosen, f"{how}. None was picked by hand."


def make_gallery(
    index: LatentIndex,
    sae: SparseAutoencoder,
    model: VisionModel | None,
    *,
    n: int,
    seed: int,
    key: str,
    line: ProgressLine,
    stored: StoredCodes | None = None,
) -> Gallery:
    """Load and encode the images of `n` latents, with heatmaps if possible.

    Args:
        index: of the SAE.
        sae: the SAE.
        model: the model to run over the images; without it they are shown as they are.
        n: number of latents.
        seed: seed of the random choice.
        key: prefix of the images' keys, unique on the page.
        line: progress line that counts images.
        stored: where heatmaps can be read, so that no model needs to run.
    """
    chosen, how = choose_latents(index, n, seed)
    gallery = Gallery(how)
    shown = {latent: _shown(index, latent) for latent, _ in chosen}
    wanted: dict[int, list[int]] = {}
    for latent, examples in shown.items():
        for example in {example.image: example for row in examples for example in row}.values():
            wanted.setdefault(example.image, []).append(latent)
    seen = see(index, sae, model, wanted, line, stored)
    grids = seen.grids
    gallery.notes += seen.notes
    gallery.pictures |= {f"{key}{image}": picture for image, picture in seen.pictures.items()}
    n_prefix = _n_prefix(index, model)
    for latent, why in chosen:
        peak = max(
            (float(grid.max()) for (_, of), grid in grids.items() if of == latent), default=0
        )

        def shot(example: Example, latent: int = latent, peak: float = peak) -> Shot:
            grid, info = grids.get((example.image, latent)), index.info(example.image)
            name = f"{key}{example.image}"
            return Shot(
                picture=name if name in gallery.pictures else "",
                heat=""
                if grid is None or not grid.any()
                else png_uri(heat_image(grid, look="spotlight", peak=peak)),
                activation=example.activation,
                caption=info.label or info.id,
                prefix=example.token < n_prefix,
            )

        top, *bands = [[shot(example) for example in row] for row in shown[latent]]
        names = _band_names(len(bands))
        gallery.cards.append(
            Card(latent, why, index.row(latent), top, list(zip(names, bands, strict=True)))
        )
    return gallery


def _shown(index: LatentIndex, latent: int) -> list[list[Example]]:
    """Return the strongest examples, then those from every quantile, in the order of the card."""
    return [
        index.top(latent)[:TOP_SHOWN],
        *(_spread(band, SAMPLES_PER_BAND) for band in index.samples(latent)),
    ]


def _spread(band: list[Example], n: int) -> list[Example]:
    """Take `n` evenly spaced examples, so that they represent the whole band."""
    if len(band) <= n:
        return band
    return [band[(2 * i + 1) * len(band) // (2 * n)] for i in range(n)]


@dataclass
class Seen:
    """Images of examples, as the model saw them if there is a model."""

    pictures: dict[int, Image.Image] = field(default_factory=dict)
    """Pixels by image, none larger than `LARGEST`."""
    grids: dict[tuple[int, int], Heat] = field(default_factory=dict)
    """Activations at the patches, by image and latent."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""


def see(
    index: LatentIndex,
    sae: SparseAutoencoder | None,
    model: VisionModel | None,
    wanted: Mapping[int, Sequence[int]],
    line: ProgressLine,
    stored: StoredCodes | None = None,
) -> Seen:
    """Load images; read their heatmaps, or run the model over them.

    Args:
        index: of the SAE.
        sae: the SAE; None without heatmaps.
        model: the model to run over the images if nothing is stored; without either, no heatmaps.
        wanted: latents to make heatmaps of, by image.
        line: progress line that counts images.
        stored: where heatmaps can be read.
    """
    seen = Seen()
    if not has_heatmaps(index.tokens, index.site):
        seen.notes.append(
            f"No heatmaps: this SAE reads one vector per image (tokens = {index.tokens})."
        )
    images = sorted(wanted)
    line.expect(len(images))
    for start in range(0, len(images), _BATCH):
        some = {image: wanted[image] for image in images[start : start + _BATCH]}
        _see_batch(seen, some, index, sae, model, stored)
        line.advance(len(some))
    return seen


def _see_batch(
    seen: Seen,
    wanted: Mapping[int, Sequence[int]],
    index: LatentIndex,
    sae: SparseAutoencoder | None,
    model: VisionModel | None,
    stored: StoredCodes | None,
) -> None:
    pictures: dict[int, Image.Image] = {}
    for image in wanted:
        try:
            pictures[image] = index.picture(image)
        except UserError as error:
            seen.notes.append(str(error))
    about = index.manifest["model"]
    if stored is not None or model is None:
        said = about.get("preprocessing") or {}
        pictures = {i: seen_picture(picture, said) or picture for i, picture in pictures.items()}
        if stored is not None:
            there = {image: wanted[image] for image in pictures}
            seen.grids |= stored_heatmaps(stored, there, tuple(about["patch_grid"]))
    elif pictures:
        pixels = torch.stack([model.transform(picture) for picture in pictures.values()])
        pictures = dict(zip(pictures, seen_pictures(model, pixels), strict=True))
        if sae is not None and has_heatmaps(index.tokens, index.site):
            latents = sorted({latent for image in pictures for latent in wanted[image]})
            heat = patch_heatmaps(sae, model, pixels, latents, site=index.site).cpu()
            column = {latent: place for place, latent in enumerate(latents)}
            for row, image in enumerate(pictures):
                for latent in wanted[image]:
                    seen.grids[image, latent] = heat[row, column[latent]]
    for image, picture in pictures.items():
        seen.pictures[image] = picture.copy()
        seen.pictures[image].thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)


def _band_names(n: int) -> list[str]:
    return [f"{100 * (n - i - 1) // n}–{100 * (n - i) // n} %" for i in range(n)]


def _n_prefix(index: LatentIndex, model: VisionModel | None) -> int:
    """Return the number of indexed tokens before the first patch."""
    if index.tokens != "all":
        return 0
    return int(model.n_prefix if model else index.manifest["model"].get("n_prefix", 0))
