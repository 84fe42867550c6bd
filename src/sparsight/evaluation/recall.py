"""Retrieval between images and captions: how high the right answer is ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.intervals import wilson_interval

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """One direction of retrieval.

    Attributes:
        at: share of queries with a right answer among the top 1, 5 and 10.
        interval: 95 % Wilson interval of each.
        median_rank: median rank of the best right answer, from 1.
        n: number of queries.
        candidates: number of candidates for each query.
    """

    at: dict[int, float]
    interval: dict[int, tuple[float, float]]
    median_rank: float
    n: int
    candidates: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as values for JSON."""
        return {
            **{f"recall_{k}": share for k, share in self.at.items()},
            **{f"recall_{k}_interval": bounds for k, bounds in self.interval.items()},
            "median_rank": self.median_rank,
            "n": self.n,
            "candidates": self.candidates,
        }


def image_text_recall(
    images: Float[Tensor, "images d_embed"],
    texts: Float[Tensor, "texts d_embed"],
    text_of: Int[Tensor, " images"],
) -> tuple[Recall, Recall]:
    """Measure image-to-text and text-to-image retrieval by cosine.

    Args:
        images: embeddings, normalised or not.
        texts: embeddings of the distinct captions.
        text_of: the caption of each image; if several images share one, each of them is right for
            it.
    """
    cosine = normalize(images.float(), dim=1) @ normalize(texts.float(), dim=1).T
    own = cosine.gather(1, text_of[:, None])
    # At equal cosines wrong answers rank higher, so that no hit depends on the order.
    to_text = (cosine >= own).sum(dim=1)
    right = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, text_of[:, None], True)
    best = cosine.masked_fill(~right, -torch.inf).amax(dim=0)
    asked = right.any(dim=0)
    to_image = 1 + ((cosine >= best) & ~right).sum(dim=0)[asked]
    return _recall(to_text, cosine.shape[1]), _recall(to_image, cosine.shape[0])


def distinct(captions: Sequence[str]) -> tuple[list[str], Int[Tensor, " images"]]:
    """Return the distinct captions, and the number of each image's caption among them."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    return list(numbers), torch.tensor([numbers[text] for text in captions])


def _recall(ranks: Int[Tensor, " queries"], candidates: int) -> Recall:
    n = len(ranks)
    hits = {k: int((ranks <= k).sum()) for k in DEPTHS}
    return Recall(
        {k: found / n for k, found in hits.items()},
        {k: wilson_interval(found, n) for k, found in hits.items()},
        float(ranks.double().quantile(0.5)),
        n,
        candidates,
    )
