"""The strongest activation of each latent in each image of a batch of codes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float32, Int
from torch import Tensor

from sparsight.latents.examples import strength_rank
from sparsight.sae import SparseCode


@dataclass(frozen=True)
class ImageMaxima:
    """Pairs of an image and a latent that fires in it, by image and then by latent.

    Attributes:
        image: number of the image in the batch.
        latent: the latent.
        value: its strongest activation in the image.
        token: the first position that has it.
        order: entries of the code by pair, the strongest of each pair first.
        pair: pair of each entry, in this order.
        lengths: entries per pair.
    """

    image: Int[Tensor, " pairs"]
    latent: Int[Tensor, " pairs"]
    value: Float32[Tensor, " pairs"]
    token: Int[Tensor, " pairs"]
    order: Int[Tensor, " entries"]
    pair: Int[Tensor, " entries"]
    lengths: Int[Tensor, " pairs"]


def image_maxima(code: SparseCode, n_tokens: int) -> ImageMaxima:
    """Find the strongest activations, on the device of the code.

    Args:
        code: rows of whole images, `n_tokens` each.
        n_tokens: rows per image.
    """
    values, rows = code.values.float(), code.rows
    key = rows // n_tokens * code.n_latents + code.indices
    order = _by_key_and_strength(key, values)
    keys, pair, lengths = key[order].unique_consecutive(return_inverse=True, return_counts=True)
    strongest = order[lengths.cumsum(0) - lengths]
    return ImageMaxima(
        keys // code.n_latents,
        keys % code.n_latents,
        values[strongest],
        rows[strongest] % n_tokens,
        order,
        pair,
        lengths,
    )


def _by_key_and_strength(
    key: Int[Tensor, " entries"], values: Float32[Tensor, " entries"]
) -> Int[Tensor, " entries"]:
    """Return an order by key, then strength; among equals the first stays first."""
    if not len(key) or int(key.max()) < 1 << 31:
        return ((key << 32) + strength_rank(values)).argsort(stable=True)
    order = strength_rank(values).argsort(stable=True)
    return order[key[order].argsort(stable=True)]
