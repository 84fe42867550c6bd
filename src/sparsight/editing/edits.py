"""What is to be done at a site: to latents of an SAE, to neurons, to directions."""

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
"""Which positions of a site are changed; `all` has registers, too."""


@dataclass(frozen=True, eq=False)
class LatentEdit:
    """What to do with some latents of an SAE.

    A vector x becomes x + dec(f′) − dec(f), where f is its code and f′ the code after the action:
    what the SAE does not reconstruct stays as it is (Templeton et al. 2024, "Scaling
    monosemanticity", section "Methodological details"). That is x + s ⊙ ((f′ − f) W_dec) with the
    scale s of the SAE's normaliser. The code is not selected again: a latent that a TopK SAE did
    not choose may be set to something, and none takes the place of one that is switched off.

    Attributes:
        sae: an autoencoder, no transcoder.
        latents: which; None is all, and none at all changes nothing (or `Keep`s nothing).
        action: what; values are in the units of the SAE's codes.
        site: where; default the site that the SAE was trained on.
        tokens: at which positions; default those that the SAE was trained on, `all` if it does not
            say.
    """

    sae: SparseAutoencoder
    latents: Sequence[int] | None
    action: Action
    site: str | None = None
    tokens: Positions | None = None

    def __post_init__(self) -> None:
        if self.sae.is_transcoder:
            raise UserError(
                "A transcoder cannot be edited at the site that it reads: its latents write at "
                f"{self.sae.metadata.get('target_site', 'another one')}. Take an autoencoder."
            )
        n = self.sae.n_latents
        object.__setattr__(self, "site", _site_of(self.sae, self.site))
        object.__setattr__(self, "tokens", _tokens_of(self.sae, self.tokens))
        object.__setattr__(self, "latents", checked_numbers(self.latents, n, "latent", "the SAE"))
        object.__setattr__(self, "action", self.action.of(numbers(self.latents, n), n))


@dataclass(frozen=True, eq=False)
class NeuronEdit:
    """The same actions on a site's own coordinates, such as the neurons of an MLP.

    Attributes:
        site: where.
        neurons: which coordinates; None is all.
        action: what; values are in the units of the model.
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

    The rows of Q are an orthonormal basis of what the directions span, found in float64
    (Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section
    2.4). Afterwards a vector has nothing along them, or what the mean has.

    Attributes:
        directions: rows that need neither be orthogonal, nor independent, nor of norm 1.
        site: where.
        tokens: at which positions.
        mean: what is left along the directions; None is 0.
        sae: the SAE that they are of, so that it is compared with the model.
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
                f"DirectionAblation: directions are {list(rows.shape)}; give finite rows "
                "[n, d_in], at least one."
            )
        if self.mean is not None and (
            self.mean.shape != rows.shape[1:] or not bool(self.mean.isfinite().all())
        ):
            raise UserError(
                f"DirectionAblation: mean is {list(self.mean.shape)}; give a finite vector of "
                f"width {rows.shape[1]}."
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
        """Of the decoder rows of latents, in the units of the model.

        Args:
            sae: an autoencoder.
            latents: which.
            site: default as in `LatentEdit`.
            tokens: likewise.
            mean: what is left along the directions; None is 0.
        """
        edit = LatentEdit(sae, latents, Keep(), site, tokens)
        if edit.site is None:
            raise UserError(NO_SITE)
        assert edit.tokens is not None
        return cls(decoder_rows(sae, latents), edit.site, edit.tokens, mean, sae)

    def basis(self) -> Float[Tensor, "rank d_in"]:
        """Orthonormal rows that span the directions, float64.

        Raises:
            UserError: all directions are 0.
        """
        rows = self.directions.detach().double()
        norms = rows.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            raise UserError("DirectionAblation: a direction is 0 everywhere; leave it out.")
        # As QR, but it says how many of them are independent, to the precision that they have.
        _, strengths, basis = torch.linalg.svd(rows / norms, full_matrices=False)
        found: Tensor = basis[strengths > 1e-6 * strengths[0]]
        return found


NO_SITE = "The SAE does not say at which site it was trained; give the edit a site."

Edit = LatentEdit | NeuronEdit | DirectionAblation


def decoder_rows(sae: SparseAutoencoder, latents: Sequence[int]) -> Float[Tensor, "chosen d_in"]:
    """What latents write, in the units of the model; with a normaliser that measures every vector
    by itself, up to the length."""
    chosen = torch.tensor(list(numbers(latents, sae.n_latents)), device=sae.W_dec.device)
    rows: Tensor = sae.W_dec.detach()[chosen]
    return rows if sae.normaliser.per_vector else rows * sae.normaliser.scale


def touched(edit: LatentEdit) -> Int[Tensor, " touched"]:
    """The latents that an edit may change; in order, as its action has them."""
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
            "The SAE was trained on the mean over the patches, which is no position of the model. "
            "Say with tokens=… where it is to be used all the same."
        )
    return own


def _check_tokens(tokens: str) -> None:
    if tokens not in get_args(Positions):
        raise UserError(
            f"tokens={tokens!r} cannot be edited. Choose one of: {', '.join(get_args(Positions))}."
        )


def numbers(chosen: Sequence[int] | None, n: int) -> Sequence[int]:
    """What is chosen out of `n`; None is all."""
    return range(n) if chosen is None else chosen


def checked_numbers(
    chosen: Sequence[int] | None, n: int | None, noun: str, owner: str
) -> tuple[int, ...] | None:
    """Numbers of latents or neurons, each once."""
    if chosen is None:
        return None
    try:
        found = tuple(operator.index(each) for each in chosen)
    except TypeError as error:
        raise UserError(f"{noun}s are given by their numbers; {chosen!r} holds others.") from error
    wrong = [each for each in found if each < 0 or (n is not None and each >= n)]
    if wrong:
        most = "" if n is None else f" to {n - 1}"
        raise UserError(f"{owner} has {noun}s 0{most}; there is no {wrong[0]}.")
    if len(set(found)) < len(found):
        twice = next(each for each in found if found.count(each) > 1)
        raise UserError(f"{noun} {twice} is given twice.")
    return found
