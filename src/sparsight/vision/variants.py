"""Apply several edits of one site in one forward pass, computing what comes before it once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.vision.hooks import Edit, checked, touching
from sparsight.vision.model import VisionModel

_WHOLE_STATE = ("resid_pre", "resid_post", "final_norm", "embedding")
"""Sites on which alone everything after them depends; not a block's attn_out, mlp_out."""


def embed_variants(
    model: VisionModel,
    pixels: Float[Tensor, "batch 3 height width"],
    site: str,
    edits: Mapping[str, Edit],
) -> dict[str, Float[Tensor, "batch d_embed"]]:
    """Embed images as they are (`original`), and with each edit of `site`.

    The result is that of `embed_images` inside `model.edit`, once per edit. If the site is the
    whole state of the model, the variants form one larger batch from there on, with no more images
    at a time than `pixels` has.

    Args:
        model: the model.
        pixels: preprocessed images.
        site: where to edit.
        edits: edits by name, as `model.edit` takes them.
    """
    site = model.canonical_site(site)
    if not edits or site.split(".")[-1] not in _WHOLE_STATE:
        found = {"original": model.embed_images(pixels)}
        for name, edit in edits.items():
            with model.edit({site: edit}):
                found[name] = model.embed_images(pixels)
        return found
    touches = [checked(site, edit) for edit in edits.values()]

    def fan_out(x: Tensor) -> Tensor:
        variants = (touch(x) for touch in touches)
        return torch.cat([x, *(variant for variant in variants if variant is not None)])

    n = len(edits) + 1
    parts: list[list[Tensor]] = [[] for _ in range(n)]
    for images in pixels.split(max(1, len(pixels) // n)):
        with touching(model._anatomy.sites[site].place, fan_out):
            embedded = model.embed_images(images)
        if len(embedded) != n * len(images):
            raise SparsightError(
                f"{model.id}: {n} variants of {len(images)} images at {site} gave "
                f"{len(embedded)} embeddings."
            )
        for part, rows in zip(parts, embedded.chunk(n), strict=True):
            part.append(rows)
    return {name: torch.cat(rows) for name, rows in zip(("original", *edits), parts, strict=True)}
