"""A bounded table of examples per latent: the strongest or a random sample, batch by batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

RANK_BITS = 40
EMPTY = (1 << RANK_BITS) - 1
"""Rank of an empty place in the table; above all others."""

_LARGEST_FLOAT = 0x7FFFFFFF


class ExampleTable:
    """At most `size` examples per latent: those of lowest rank; among equals, the earliest.

    The final table depends on the examples and their order, not on the batches. An update touches
    only the latents that it changes, and memory stays at `n_latents × size`.

    Attributes:
        rank: int64 `[n_latents, size]`, ascending; `EMPTY` in empty places.
        image: int64, −1 in empty places.
        token: int32, −1 in empty places.
        activation: float32, 0 in empty places.
    """

    def __init__(self, n_latents: int, size: int, device: torch.device | str = "cpu") -> None:
        shape = (n_latents, size)
        self.size = size
        self.rank = torch.full(shape, EMPTY, dtype=torch.int64, device=device)
        self.image = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.token = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.activation = torch.zeros(shape, dtype=torch.float32, device=device)

    def offer(
        self,
        latent: Int[Tensor, " pairs"],
        rank: Int[Tensor, " pairs"],
        image: Int[Tensor, " pairs"],
        token: Int[Tensor, " pairs"],
        activation: Float[Tensor, " pairs"],
    ) -> None:
        """Take examples that rank below the worst one kept; ranks are from 0 to `EMPTY` − 1."""
        within = rank < self.rank[latent, -1]
        latent, rank, image = latent[within], rank[within], image[within]
        token, activation = token[within].to(torch.int32), activation[within]
        touched = latent.unique()
        if not len(touched):
            return
        # Every touched latent contributes its `size` places, so that each has `size` after the cut.
        places = torch.arange(len(touched), device=touched.device)
        group = torch.cat(
            [places.repeat_interleave(self.size), torch.searchsorted(touched, latent)]
        )
        ranks = torch.cat([self.rank[touched].flatten(), rank])
        images = torch.cat([self.image[touched].flatten(), image])
        tokens = torch.cat([self.token[touched].flatten(), token])
        activations = torch.cat([self.activation[touched].flatten(), activation])

        order = ((group << RANK_BITS) + ranks).argsort(stable=True)
        ordered = group[order]
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
        chosen = order[place < self.size].view(len(touched), self.size)
        self.rank[touched] = ranks[chosen]
        self.image[touched] = images[chosen]
        self.token[touched] = tokens[chosen]
        self.activation[touched] = activations[chosen]


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
