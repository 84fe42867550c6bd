"""Example images of every latent, exact, from the posting lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sparsight.latents.postings import Postings

RANK_BITS = 40

_LARGEST_FLOAT = 0x7FFFFFFF


@dataclass(frozen=True)
class Examples:
    """Images, tokens and activations of examples; empty places have image −1 and activation 0.

    The strongest: `[n_latents, top_n]`, strongest first. Samples of bands: `[n_latents, quantiles,
    samples]`, the strongest band first. The uniform sample: `[n_latents, samples]`.
    """

    image: Int[Tensor, "n_latents ..."]
    token: Int[Tensor, "n_latents ..."]
    activation: Float[Tensor, "n_latents ..."]

    @classmethod
    def empty(cls, *shape: int) -> Examples:
        """Return empty places."""
        return cls(
            torch.full(shape, -1, dtype=torch.int64),
            torch.full(shape, -1, dtype=torch.int32),
            torch.zeros(shape),
        )


@dataclass(frozen=True)
class LatentEntries:
    """The entries of a block of latents, each latent's strongest first.

    Attributes:
        latent: latent of each entry, rising.
        image: place of its image; among equal activations, rising.
        token: position of the activation.
        value: the activation.
        rank: 0 for the strongest entry of its latent.
        count: number of entries of its latent.
    """

    latent: Int64[Tensor, " n"]
    image: Int64[Tensor, " n"]
    token: Int64[Tensor, " n"]
    value: Float[Tensor, " n"]
    rank: Int64[Tensor, " n"]
    count: Int64[Tensor, " n"]

    @classmethod
    def read(cls, postings: Postings, latents: range) -> LatentEntries:
        """Read the entries of a range of latents."""
        assert postings.tokens is not None
        bounds = postings.offsets[latents.start : latents.stop + 1]
        here = slice(int(bounds[0]), int(bounds[-1]))
        latent = torch.from_numpy(postings.rows_of(latents))
        value = torch.from_numpy(postings.values[here].copy())
        order = ((latent - latents.start << 32) + strength_rank(value)).argsort(stable=True)
        image, token = (
            torch.from_numpy(column[here].astype(np.int64))
            for column in (postings.columns, postings.tokens)
        )
        # Ordering keeps each latent's entries together.
        return cls.ranked(latent, image[order], token[order], value[order])

    @classmethod
    def ranked(
        cls,
        latent: Int64[Tensor, " n"],
        image: Int64[Tensor, " n"],
        token: Int64[Tensor, " n"],
        value: Float[Tensor, " n"],
    ) -> LatentEntries:
        """Number entries that are in order within their latents."""
        start, count = groups(latent)
        return cls(latent, image, token, value, torch.arange(len(latent)) - start, count)


@dataclass(frozen=True)
class ExampleTables:
    """The examples of all latents, filled in block by block.

    Attributes:
        top: the strongest images.
        bands: samples from equal bands of the images in which a latent fires, ordered by strength.
        uniform: a sample of all images in which it fires, strongest first.
        seed: seed of both samples.
    """

    top: Examples
    bands: Examples
    uniform: Examples
    seed: int

    def fill(self, entries: LatentEntries) -> None:
        """Choose the examples of a block of latents.

        A band of `quantiles` holds the ranks from `band / quantiles` to `(band + 1) / quantiles`,
        exactly; a sample has the images of lowest `lottery_rank`.
        """
        strongest = entries.rank < self.top.image.shape[1]
        _put(self.top, entries, strongest, (entries.latent, entries.rank))
        ticket = lottery_rank(entries.latent, entries.image, self.seed)
        quantiles, per_band = self.bands.image.shape[1:]
        band = entries.rank * quantiles // entries.count.clamp(min=1)
        chosen, slot = _drawn(entries.latent * quantiles + band, ticket, per_band)
        _put(self.bands, entries, chosen, (entries.latent, band, slot))
        chosen, slot = _drawn(entries.latent, ticket, self.uniform.image.shape[1])
        _put(self.uniform, entries, chosen, (entries.latent, slot))


def _put(
    table: Examples, entries: LatentEntries, chosen: Tensor, place: tuple[Tensor, ...]
) -> None:
    here = tuple(index[chosen] for index in place)
    table.image[here] = entries.image[chosen]
    table.token[here] = entries.token[chosen].to(torch.int32)
    table.activation[here] = entries.value[chosen]


def _drawn(
    group: Int64[Tensor, " n"], ticket: Int64[Tensor, " n"], most: int
) -> tuple[Tensor, Int64[Tensor, " n"]]:
    """Draw up to `most` entries of every group, by lowest ticket.

    Args:
        group: group of each entry, rising.
        ticket: below 2^`RANK_BITS`.
        most: entries per group.

    Returns:
        Which entries are drawn, and the number of drawn ones before each in its group.
    """
    if not len(group):
        return torch.zeros(0, dtype=torch.bool), group
    # Groups are numbered from 0, so that a key fits 63 bits.
    number = group.unique_consecutive(return_inverse=True)[1]
    start, _ = groups(group)
    order = ((number << RANK_BITS) + ticket).argsort(stable=True)
    chosen = torch.zeros(len(group), dtype=torch.bool)
    chosen[order] = torch.arange(len(group)) - start < most
    before = chosen.long().cumsum(0) - chosen.long()
    return chosen, before - before[start]


def groups(group: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Return, for each entry, the first entry of its group and the size of the group.

    Args:
        group: group of each entry; equal ones stand together.
    """
    _, number, lengths = group.unique_consecutive(return_inverse=True, return_counts=True)
    return (lengths.cumsum(0) - lengths)[number], lengths[number]


def strength_rank(activation: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return exact ranks, below 2^32, that put the largest activation first.

    The bits of positive float32 numbers, read as integers, are in the order of the numbers; those
    of negative ones, without the sign bit, are in reverse order.
    """
    bits = activation.float().contiguous().view(torch.int32).to(torch.int64)
    return _LARGEST_FLOAT - torch.where(bits < 0, -(bits & _LARGEST_FLOAT), bits)


def lottery_rank(
    latent: Int[Tensor, " n"], image: Int[Tensor, " n"], seed: int
) -> Int[Tensor, " n"]:
    """Return a pseudo-random rank for each (latent, image): the lowest ranks are a random sample.

    It is SplitMix64's mixing function (Steele et al. 2014) on int64 with wrap-around.
    """
    x = (latent << 40) ^ image
    x = x + _wrapped((seed + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _wrapped(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 65 - RANK_BITS)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right logically; torch's shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(value: int) -> int:
    """Return a 64-bit pattern as a signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
