"""Edits of a site: of latents of an SAE, of neurons, of directions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.editing.actions import Action, Keep
from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder

Positions = Literal["cls", "patches", "all"]
"""Which positions of a site are changed; `all` includes registers."""


@dataclass(frozen=True, eq=False)
class LatentEdit:
    """An action on latents of an SAE.

    A vector x becomes x + dec(f′) − dec(f), where f is its code and f′ the code after the action:
    what the SAE does not reconstruct stays as it is (Templeton et al. 2024, "Scaling
    monosemanticity", section "Methodological details"). That is x + s ⊙ ((f′ − f) W_dec) with the
    scale s of the SAE's normaliser. The code is not selected again: a latent that a TopK SAE did
    not choose may be set to a value, and no other latent replaces one that is switched off.

    Attributes:
        sae: an autoencoder, not a transcoder.
        latents: which latents; None means all, and an empty list changes nothing (with `Keep`, it
            keeps nothing).
        action: what to do; values are in the units of the SAE's codes.
        site: where; default: the site that the SAE was trained on.
        tokens: at which positions; default: those that the SAE was trained on, `all` if it does
            not say.
    """

    sae: SparseAutoencoder
    latents: Sequence[int] | None
    action: Action
    site: str | None = None
    tokens: Positions | None = None

    def __post_init__(self) -> None:
        if self.sae.is_transcoder:
            raise UserError(
                "A transcoder cannot edit the site that it reads: its latents write at "
                f"{self.sae.metadata.get('target_site', 'another one')}. Use an autoencoder."
            )
        n = self.sae.n_latents
        object.__setattr__(self, "site", _site_of(self.sae, self.site))
        object.__setattr__(self, "tokens", _tokens_of(self.sae, self.tokens))
        object.__setattr__(self, "latents", checked_numbers(self.latents, n, "latent", "the SAE"))
        object.__setattr__(self, "action", self.action.of(numbers(self.latents, n), n))


@dataclass(frozen=True, eq=False)
class NeuronEdit:
    """An action on a site's own coordinates, such as the neurons of an MLP.

    Attributes:
        site: where.
        neurons: which coordinates; None means all.
        action: what to do; values are in the units of the model.
        tokens: at which positions.
    """

    site: str
    neurons: Sequence[int] | None
    action: Action
    tokens: Positions = "all"

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        neurons = checked_numbers(self.neurons, None, "neuron", self.site)
        object.__setattr__(self, "neurons", neurons)


@dataclass(frozen=True, eq=False)
class DirectionAblation:
    """Project directions out of a site's vectors: x − (x − mean) QᵀQ.

    The rows of Q are an orthonormal basis of the span of the directions, computed in float64
    (Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section
    2.4). Afterwards a vector's component along them is 0, or that of the mean.

    Attributes:
        directions: rows, which need not be orthogonal, independent or of norm 1.
        site: where.
        tokens: at which positions.
        mean: vector whose component along the directions remains; None is 0.
        sae: the SAE from which the directions come, if it is to be checked against the model.
    """

    directions: Float[Tensor, "n d_in"]
    site: str
    tokens: Positions = "all"
    mean: Float[Tensor, " d_in"] | None = None
    sae: SparseAutoencoder | None = None

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        rows = self.directions
        if rows.ndim != 2 or not rows.shape[0] or not bool(rows.isfinite().all()):
            raise UserError(
                f"DirectionAblation: directions have shape {list(rows.shape)}; give at least one "
                "row [n, d_in], all finite."
            )
        if self.mean is not None and (
            self.mean.shape != rows.shape[1:] or not bool(self.mean.isfinite().all())
        ):
            raise UserError(
                f"DirectionAblation: mean has shape {list(self.mean.shape)}; give a finite vector "
                f"of width {rows.shape[1]}."
            )

    @classmethod
    def of_latents(
        cls,
        sae: SparseAutoencoder,
        latents: Sequence[int],
        *,
        site: str | None = None,
        tokens: Positions | None = None,
        mean: Float[Tensor, " d_in"] | None = None,
    ) -> DirectionAblation:
        """Ablate the decoder rows of latents, in the units of the model.

        Args:
            sae: an autoencoder.
            latents: which latents.
            site: where; default: as in `LatentEdit`.
            tokens: at which positions; default: as in `LatentEdit`.
            mean: vector whose component along the directions remains; None is 0.
        """
        edit = LatentEdit(sae, latents, Keep(), site, tokens)
        if edit.site is None:
            raise UserError(NO_SITE)
        assert edit.tokens is not None
        return cls(decoder_rows(sae, latents), edit.site, edit.tokens, mean, sae)

    def basis(self) -> Float[Tensor, "rank d_in"]:
        """Return orthonormal rows that span the directions, in float64.

        Raises:
            UserError: a direction is 0.
        """
        rows = self.directions.detach().double()
        norms = rows.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            raise UserError("DirectionAblation: a direction is 0 everywhere; leave it out.")
        # Like QR, but it shows how many of them are independent at their precision.
        _, strengths, basis = torch.linalg.svd(rows / norms, full_matrices=False)
        found: Tensor = basis[strengths > 1e-6 * strengths[0]]
        return found


NO_SITE = "The SAE does not say at which site it was trained; give a site with site=…."

Edit = LatentEdit | NeuronEdit | DirectionAblation


def decoder_rows(sae: SparseAutoencoder, latents: Sequence[int]) -> Float[Tensor, "chosen d_in"]:
    """Return what latents write, in the units of the model.

    With a normaliser that measures every vector by itself, the length is undetermined.
    """
    chosen = torch.tensor(list(numbers(latents, sae.n_latents)), device=sae.W_dec.device)
    rows: Tensor = sae.W_dec.detach()[chosen]
    return rows if sae.normaliser.per_vector else rows * sae.normaliser.scale


def touched(edit: LatentEdit) -> Int[Tensor, " touched"]:
    """Return the latents that an edit may change, in the order that its action uses."""
    n = edit.sae.n_latents
    chosen = torch.tensor(list(numbers(edit.latents, n)), dtype=torch.int64)
    if not isinstance(edit.action, Keep):
        return chosen
    dropped = torch.ones(n, dtype=torch.bool)
    dropped[chosen] = False
    return dropped.nonzero()[:, 0]


def _site_of(sae: SparseAutoencoder, site: str | None) -> str | None:
    own = sae.metadata.get("site")
    return site if site is not None else (None if own is None else str(own))


def _tokens_of(sae: SparseAutoencoder, tokens: str | None) -> str:
    if tokens is not None:
        _check_tokens(tokens)
        return tokens
    own = str(sae.metadata.get("tokens") or "all")
    if own == "mean":
        raise UserError(
            "The SAE was trained on the mean over the patches, which is not a position of the "
            "model. Say with tokens=… at which positions to use it anyway."
        )
    return own


def _check_tokens(tokens: str) -> None:
    if tokens not in get_args(Positions):
        raise UserError(
            f"tokens={tokens!r} cannot be edited. Choose one of: {', '.join(get_args(Positions))}."
        )


def numbers(chosen: Sequence[int] | None, n: int) -> Sequence[int]:
    """Return the chosen numbers out of `n`; None means all."""
    return range(n) if chosen is None else chosen


def checked_numbers(
    chosen: Sequence[int] | None, n: int | None, noun: str, owner: str
) -> tuple[int, ...] | None:
    """Return numbers of latents or neurons, after checking that each is valid and given once."""
    if chosen is None:
        return None
    try:
        checked = tuple(operator.index(number) for number in chosen)
    except TypeError as error:
        raise UserError(
            f"{noun}s are given as whole numbers; {chosen!r} holds something else."
        ) from error
    wrong = [number for number in checked if number < 0 or (n is not None and number >= n)]
    if wrong:
        valid = "numbers start at 0" if n is None else f"it has 0 to {n - 1}"
        raise UserError(f"{owner} has no {noun} {wrong[0]}; {valid}.")
    if len(set(checked)) < len(checked):
        twice = next(number for number in checked if checked.count(number) > 1)
        raise UserError(f"{noun} {twice} is given twice; name it once.")
    return checked
