"""What is raised: a latent's pre-activation, read with gradients inside the model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.errors import SparsightError, UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.hooks import StopForward
from sparsight.vision.tokens import Tokens, select_tokens
from sparsight.visualisation.settings import Pool

SHARPNESS = 8.0
"""Weights of tokens in the pool `softmax` are exp(SHARPNESS · pre-activation / unit)."""

RIVALS = 16
"""Other latents that are pressed down at once: the strongest ones."""


def vectors_with_gradients(
    model: VisionModel,
    pixels: Float[Tensor, "batch 3 height width"],
    site: str,
    tokens: Tokens,
) -> Float[Tensor, "batch tokens d_in"]:
    """Read a site like `model.read`, but with gradients to the pixels; float32 or wider.

    The forward pass stops at the site.
    """
    caught: list[Tensor] = []

    def catch(x: Tensor) -> Tensor:
        caught.append(x)
        raise StopForward

    with model.edit({site: catch}), suppress(StopForward):
        model.embed_images(pixels)
    if not caught:
        raise SparsightError(f"{model.id}: the forward pass never reached {site}.")
    x = caught[0]
    if model.token_count(site, "all") > 1:
        x = select_tokens(x, tokens, model.n_prefix, model.has_cls)
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Raised(NamedTuple):
    """What a step raises and lowers, each in units of a strong activation."""

    strength: Float[Tensor, " batch"]
    """The latent's pooled pre-activation."""

    rivals: Float[Tensor, " batch"]
    """The mean activation of the strongest other latents, where the latent is strongest."""

    look: Float[Tensor, "batch d_in"]
    """The mean direction of the vectors, in which images can be compared."""


@dataclass(frozen=True)
class Objective:
    """One latent of an SAE at a site.

    Attributes:
        model: the model.
        sae: the SAE, frozen.
        site: canonical name.
        tokens: positions that the SAE sees.
        latent: its number.
        pool: how the tokens become one number.
        unit: a strong activation of the latent: that on the best real image, if there is one.
        press: whether the other latents are needed.
    """

    model: VisionModel
    sae: SparseAutoencoder
    site: str
    tokens: Tokens
    latent: int
    pool: Pool
    unit: float
    press: bool = False

    def __call__(self, pixels: Float[Tensor, "batch 3 height width"]) -> Raised:
        """Run the model up to the site."""
        x = vectors_with_gradients(self.model, pixels, self.site, self.tokens)
        scores = self.sae.pre_activations(x.flatten(0, 1), [self.latent]).view(x.shape[:2])
        scores = scores / self.unit
        rivals = self._rivals(x, scores) if self.press else torch.zeros_like(scores[:, 0])
        weights = self.sae.weights()
        centre = weights.centre if self.sae.is_transcoder else weights.b_dec
        look = normalize(self.sae.normaliser(x.mean(1)) - centre, dim=1)
        return Raised(self._pooled(scores), rivals, look)

    def _pooled(self, scores: Float[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
        if self.pool == "max" or scores.shape[1] == 1:
            return scores.amax(1)
        if self.pool == "softmax":
            weights = (SHARPNESS * scores.detach()).softmax(1)
            return (weights * scores).sum(1)
        if self.pool == "cls":
            return scores[:, 0]
        return scores[:, self._first_patch() :].mean(1)

    def _first_patch(self) -> int:
        return self.model.n_prefix if self.tokens == "all" else 0

    def _rivals(
        self, x: Float[Tensor, "batch tokens d_in"], scores: Float[Tensor, "batch tokens"]
    ) -> Float[Tensor, " batch"]:
        strongest = x[torch.arange(len(x)), scores.argmax(1)]
        others = self.sae.pre_activations(strongest)
        own = torch.zeros_like(others, dtype=torch.bool)
        own[:, self.latent] = True
        others = others.masked_fill(own, -torch.inf)
        return others.topk(min(RIVALS, others.shape[1] - 1), dim=1).values.relu().mean(1)


def check_pool(pool: Pool, model: VisionModel, site: str, tokens: Tokens) -> None:
    """Check that a site's tokens can be pooled in this way.

    Raises:
        UserError: there is no CLS among them.
    """
    if pool != "cls" or model.token_count(site, "all") == 1 or tokens == "cls":
        return
    if tokens != "all" or not model.has_cls:
        raise UserError(
            f"pool is 'cls', but the SAE sees the tokens {tokens!r} at {site} of {model.id}, "
            "without CLS. Use 'max', 'softmax' or 'mean'."
        )


def mean_similarity(looks: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Return the mean cosine between two different rows, which have norm 1; 0 for one row."""
    n = len(looks)
    if n < 2:
        return looks.new_zeros(())
    return (looks.sum(0).square().sum() - n) / (n * (n - 1))
