"""Search results as one page with the pictures in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from sparsight.editing.retrieval import SearchResult
from sparsight.files import write_text
from sparsight.images import ImageError, ImageSource

SIDE = 160
"""Pixels of the longer side of a picture on the page."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --muted: #5f6b76; --line: #dfe3e6; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --muted: #9aa5b0; --line: #333b43; --page: #15191d; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .2rem; }
p { margin: 0 0 .8rem; color: var(--muted); }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); }
li { border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.label { display: block; margin-top: .3rem; font-size: 13px; overflow-wrap: anywhere; }
.cosine { color: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
{% for part in parts %}
<section><h2>{{ part.title }}</h2><p>{{ part.about }}</p>
<ol>{% for hit in part.hits %}
<li>{% if hit.picture %}<img src="{{ hit.picture }}" alt="{{ hit.alt }}" loading="lazy">
{% else %}<span class="label">can no longer be read</span>{% endif %}
<span class="label">{{ hit.label }}</span>
<span class="cosine">{{ hit.rank }} · {{ hit.cosine }}</span></li>
{% endfor %}</ol></section>
{% endfor %}
</body></html>
"""

WORDS = {
    "plain": "Embeddings as they are",
    "reconstructed": "Embeddings as the SAE reconstructs them",
    "filtered": "Chosen latents alone",
    "query": "The query's own strongest latents alone",
    "steered": "Steered embeddings",
}


def write_contact_sheet(
    results: Sequence[SearchResult], images: ImageSource, path: Path, *, side: int = SIDE
) -> Path:
    """Write a page that needs nothing else: a grid of pictures for each result.

    Args:
        results: of one query, in different modes.
        images: where the pictures are.
        path: of the page.
        side: pixels of a picture's longer side.
    """
    parts = []
    for result in results:
        latents = ", ".join(map(str, result.latents[:24]))
        more = ", …" if len(result.latents) > 24 else ""
        labels = {hit.label for hit in result.hits if hit.label}
        about = [f"{len(result.hits)} pictures"]
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
                "picture": _data(images, hit.image, side),
            }
            for hit in result.hits
        ]
        parts.append({"title": WORDS[result.mode], "about": " · ".join(about), "hits": hits})
    first = results[0]
    page = Environment(autoescape=True).from_string(_PAGE)
    subtitle = f"{first.about['n_images']:,} pictures of {images.spec} · {first.about['model']}"
    write_text(path, page.render(title=f"“{first.query}”", subtitle=subtitle, parts=parts))
    return path


def _data(images: ImageSource, place: int, side: int) -> str | None:
    """A small copy of a picture as a data URL; None if it has gone."""
    try:
        picture = images.load(place)
    except ImageError:
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.convert("RGB").save(out, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
