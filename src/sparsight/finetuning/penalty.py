"""A price on latents that respond to writing, paid by the model that is fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.editing.interventions import check_belongs
from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import Tokens, VisionModel, select_tokens


@dataclass(frozen=True)
class PenalisedLatents:
    """Latents of an SAE whose activations are to fall.

    Attributes:
        sae: trained on the model as it was; it stays as it is.
        latents: which.
        site: where it reads; default the one that it names.
    """

    sae: SparseAutoencoder
    latents: Sequence[int]
    site: str | None = None

    @property
    def tokens(self) -> Tokens:
        """The positions that the SAE was trained on."""
        return cast(Tokens, self.sae.metadata.get("tokens") or "all")

    def place(self, model: VisionModel) -> str:
        """The canonical name of the site in `model`, the one that the SAE was trained on.

        Raises:
            UserError: the SAE names no site, is of another model, or has no such latent.
        """
        named = self.site or self.sae.metadata.get("site")
        if named is None:
            raise UserError("The SAE whose latents are penalised names no site; give one.")
        site = model.canonical_site(named)
        check_belongs(self.sae, model, site)
        bad = [latent for latent in self.latents if not 0 <= latent < self.sae.n_latents]
        if bad or not self.latents:
            found = f"latent {bad[0]}" if bad else "no latent"
            raise UserError(
                f"{found} is to be penalised; the SAE has the latents 0 to "
                f"{self.sae.n_latents - 1}."
            )
        return site


@dataclass
class LatentPenalty:
    """Reads activations as a forward pass makes them, under autograd, and prices latents in them.

    Args:
        model: the one that is trained.
        what: the latents.
        site: its canonical name.
    """

    model: VisionModel
    what: PenalisedLatents
    site: str
    _seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The caller's own stays where it is, and trainable.
        self._sae = copy.deepcopy(self.what.sae).requires_grad_(False).to(self.model.device)
        self._latents = torch.tensor(sorted(set(self.what.latents)), device=self.model.device)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep what the site has in the next forward pass."""
        self._seen.clear()

        def keep(x: Tensor) -> Tensor:
            self._seen.append(x)
            return x

        with self.model.edit({self.site: keep}):
            yield

    def value(self, rows: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The latents' summed activation, per vector: `Σ_i r_i Σ_t Σ_l |f_l(x_it)| / (Σ_i r_i T)`.

        Args:
            rows: weight of each picture, 1 for those that count.
        """
        x = self._seen[-1].float()
        if x.shape[1] > 1:
            x = select_tokens(x, self.what.tokens, self.model.n_prefix, self.model.has_cls)
        code = self._sae.encode(x.flatten(0, 1))
        counted = torch.isin(code.indices, self._latents)
        row = torch.repeat_interleave(
            torch.arange(len(x) * x.shape[1], device=x.device), code.offsets.diff()
        )
        weight = rows.to(x)[row[counted] // x.shape[1]]
        return (code.values[counted].abs() * weight).sum() / (rows.sum() * x.shape[1]).clamp(min=1)
