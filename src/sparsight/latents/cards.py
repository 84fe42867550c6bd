"""The report's cards of single latents: which latents, with which images and outlines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sparsight.latents.choosing import choose_latents
from sparsight.latents.index import Example, LatentIndex
from sparsight.latents.index_files import NEIGHBOURS
from sparsight.latents.outlines import outline, view_box
from sparsight.latents.seeing import Seen, see
from sparsight.latents.stored import StoredCodes
from sparsight.progress import ProgressLine
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

TOP_SHOWN = 8
"""Images per latent on a model card."""

ON_CARD = 6
"""Images per latent on the report."""

SAMPLES_PER_BAND = 2
LABELS_SHOWN = 3
SIMILAR_SHOWN = 4
LEAST_SHARE = 0.3
"""A latent counts as active in a shown image from this share of its strongest activation."""

FIRING_SHOWN = 4
"""Latents listed per image besides those whose cards show it."""


@dataclass(frozen=True)
class Shot:
    """One example on a card."""

    picture: str
    """Key into `Gallery.pictures`; empty if the image could not be loaded."""
    path: str
    """SVG path around the region where the latent is most active; empty if there is none."""
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
    row: Mapping[str, Any]
    labels: str
    """Labels of its strongest images as counts: "anchor 3, star 2"; empty without labels."""
    n_labelled: int
    """Number of strongest images that have a label."""
    top: list[Shot]
    bands: list[tuple[str, list[Shot]]]
    similar: list[tuple[int, float]]
    """Latents with the most similar decoder rows, and the cosines."""
    together: list[tuple[int, float]]
    """Latents that fire in the same images, and the correlations; empty if they are not known."""


@dataclass
class Gallery:
    """The cards of a run and the images that they share, each encoded once."""

    how_chosen: str
    """A sentence that says how the latents were chosen."""
    view_box: str = ""
    """The `viewBox` of all outlines; empty if there are none."""
    cards: list[Card] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """Images by key, none larger than `seeing.LARGEST` pixels."""
    small: set[str] = field(default_factory=set)
    """Keys of the images that only appear as small samples."""
    fires: dict[str, list[tuple[int, float, str]]] = field(default_factory=dict)
    """By key of an image: the shown latents that are active in it, strongest first relative to
    their maximum, with activation and outline (empty if a card shows it)."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""


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
    """Load and encode the images of `n` latents, with outlines if possible.

    Args:
        index: of the SAE.
        sae: the SAE.
        model: the model to run over the images; without it they are shown as they are.
        n: number of latents.
        seed: seed of the random choice.
        key: prefix of the images' keys, unique on the page.
        line: progress line that counts images.
        stored: where activations at patches can be read, so that no model needs to run.
    """
    chosen, how = choose_latents(index, sae, n, seed)
    latents = [latent for latent, _ in chosen]
    gallery = Gallery(how)
    shown = {latent: _shown(index, latent) for latent in latents}
    images = {example.image for rows in shown.values() for row in rows for example in row}
    seen = see(index, sae, model, dict.fromkeys(sorted(images), latents), line, stored)
    gallery.notes += seen.notes
    gallery.pictures |= {f"{key}{image}": picture for image, picture in seen.pictures.items()}
    large = {example.image for rows in shown.values() for example in rows[0]}
    gallery.small = {f"{key}{image}" for image in images - large}
    if seen.grids:
        gallery.view_box = view_box(*next(iter(seen.grids.values())).shape)
    on_cards = {
        (example.image, of) for of, rows in shown.items() for row in rows for example in row
    }
    paths = _outlines(seen, index, latents, on_cards)
    for (image, latent), (activation, path) in paths.items():
        if image not in large and (image, latent) not in on_cards:
            continue
        drawn = "" if (image, latent) in on_cards else path
        gallery.fires.setdefault(f"{key}{image}", []).append((latent, activation, drawn))
    n_prefix = _n_prefix(index, model)
    for latent, why in chosen:

        def shot(example: Example, latent: int = latent) -> Shot:
            info, name = index.info(example.image), f"{key}{example.image}"
            return Shot(
                picture=name if name in gallery.pictures else "",
                path=paths.get((example.image, latent), (0.0, ""))[1],
                activation=example.activation,
                caption=info.label or info.id,
                prefix=example.token < n_prefix,
            )

        top, *bands = [[shot(example) for example in row] for row in shown[latent]]
        labels, n_labelled = label_counts(index, latent)
        gallery.cards.append(
            Card(
                latent,
                why,
                index.row(latent),
                labels,
                n_labelled,
                top,
                list(zip(_band_names(len(bands)), bands, strict=True)),
                similar(index, sae, latent),
                fires_with(index, latent),
            )
        )
    return gallery


def label_counts(index: LatentIndex, latent: int) -> tuple[str, int]:
    """Count the labels of the strongest images of a latent: "anchor 3, star 2".

    Returns:
        The most frequent labels with their counts, and the number of labelled images.
    """
    labels = [index.info(example.image).label for example in index.top(latent)]
    counts = Counter(label for label in labels if label is not None)
    parts = [f"{label} {n}" for label, n in counts.most_common(LABELS_SHOWN)]
    rest = counts.total() - sum(n for _, n in counts.most_common(LABELS_SHOWN))
    if rest:
        parts.append(f"other {rest}")
    return ", ".join(parts), counts.total()


def similar(
    index: LatentIndex, sae: SparseAutoencoder, latent: int, n: int = SIMILAR_SHOWN
) -> list[tuple[int, float]]:
    """Return the latents whose decoder rows have the largest cosine with that of `latent`."""
    if index.file(NEIGHBOURS) is not None:
        return [(near.latent, near.score) for near in index.neighbours(latent, "decoder", n)]
    rows = sae.W_dec.detach().float()
    cosine = (rows @ rows[latent]) / (rows.norm(dim=1) * rows[latent].norm()).clamp(min=1e-12)
    cosine[latent] = -2
    values, places = cosine.topk(min(n, len(rows) - 1))
    return list(zip(places.tolist(), values.tolist(), strict=True))


def fires_with(index: LatentIndex, latent: int, n: int = SIMILAR_SHOWN) -> list[tuple[int, float]]:
    """Return the latents whose activation over images correlates most; [] if that is not known."""
    if index.file(NEIGHBOURS) is None:
        return []
    return [(near.latent, near.score) for near in index.neighbours(latent, "coactivation", n)]


def _outlines(
    seen: Seen, index: LatentIndex, latents: Sequence[int], on_cards: Set[tuple[int, int]]
) -> dict[tuple[int, int], tuple[float, str]]:
    """Return activation and outline of the latents that are active in each image.

    The order is that of the images and, within an image, by share of the latent's maximum. Besides
    the latents whose cards show an image, up to `FIRING_SHOWN` others are kept.
    """
    most = {latent: index.row(latent)["max_activation"] for latent in latents}
    shares = []
    for (image, latent), grid in seen.grids.items():
        peak = float(grid.max())
        own = (image, latent) in on_cards
        if peak > 0 and (own or peak >= LEAST_SHARE * most[latent]):
            shares.append((image, -peak / most[latent], latent, peak))
    kept: dict[tuple[int, int], tuple[float, str]] = {}
    others: Counter[int] = Counter()
    for image, _, latent, peak in sorted(shares):
        if (image, latent) not in on_cards:
            others[image] += 1
            if others[image] > FIRING_SHOWN:
                continue
        kept[image, latent] = (peak, outline(seen.grids[image, latent]))
    return kept


def _shown(index: LatentIndex, latent: int) -> list[list[Example]]:
    """Return the strongest examples, then those from every quantile, in the order of the card."""
    return [
        index.top(latent)[:ON_CARD],
        *(_spread(band, SAMPLES_PER_BAND) for band in index.samples(latent)),
    ]


def _spread(band: list[Example], n: int) -> list[Example]:
    """Take `n` evenly spaced examples, so that they represent the whole band."""
    if len(band) <= n:
        return band
    return [band[(2 * i + 1) * len(band) // (2 * n)] for i in range(n)]


def _band_names(n: int) -> list[str]:
    return [f"{100 * (n - i - 1) // n}–{100 * (n - i) // n} %" for i in range(n)]


def _n_prefix(index: LatentIndex, model: VisionModel | None) -> int:
    """Return the number of indexed tokens before the first patch."""
    if index.tokens != "all":
        return 0
    return int(model.n_prefix if model else index.manifest["model"].get("n_prefix", 0))
