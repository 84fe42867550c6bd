"""Write search results as one page that contains the images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sparsight.editing.retrieval import SearchResult
from sparsight.files import write_text
from sparsight.images import ImageError, ImageSource
from sparsight.pages.template import template

SIDE = 160
"""Pixels of the longer side of an image on the page."""

WORDS = {
    "plain": "Embeddings as they are",
    "reconstructed": "Embeddings as the SAE reconstructs them",
    "filtered": "Only the chosen latents",
    "query": "Only the query's own strongest latents",
    "steered": "Steered embeddings",
}


def write_contact_sheet(
    results: Sequence[SearchResult], images: ImageSource, path: str | Path, *, side: int = SIDE
) -> Path:
    """Write a self-contained page: one grid of images per result.

    Args:
        results: results of one query, in different modes.
        images: the source of the images.
        path: path of the page.
        side: pixels of an image's longer side.
    """
    path = Path(path)
    parts = []
    for result in results:
        latents = ", ".join(map(str, result.latents[:24]))
        more = ", …" if len(result.latents) > 24 else ""
        labels = {hit.label for hit in result.hits if hit.label}
        about = [f"{len(result.hits)} images"]
        if labels:
            about.append(f"{len(labels)} different labels")
        if latents:
            about.append(f"latents {latents}{more}")
        hits = [
            {
                "rank": hit.rank,
                "cosine": f"{hit.cosine:.3f}",
                "label": hit.label or hit.id,
                "alt": hit.caption or hit.label or hit.id,
                "image": _data(images, hit.image, side),
            }
            for hit in result.hits
        ]
        parts.append({"title": WORDS[result.mode], "about": " · ".join(about), "hits": hits})
    page = template("search.html.jinja")
    facts = results[0].about
    subtitle = (
        f"{facts['n_images']:,} images of {images.spec} · {facts['model']}, compared by "
        f"{facts['compared']}"
    )
    write_text(path, page.render(title=f"“{results[0].query}”", subtitle=subtitle, parts=parts))
    return path


def _data(images: ImageSource, place: int, side: int) -> str | None:
    """Return a small copy of an image as a data URL; None if it cannot be read any more."""
    try:
        image = images.load(place)
    except ImageError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.convert("RGB").save(out, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
