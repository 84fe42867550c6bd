"""A penalty on latents that respond to writing, for the model being fine-tuned."""

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
    """Latents of an SAE whose activations should fall.

    Attributes:
        sae: SAE of the original model; it stays unchanged.
        latents: numbers of the latents.
        site: where the SAE reads; default: the site that it names.
    """

    sae: SparseAutoencoder
    latents: Sequence[int]
    site: str | None = None

    @property
    def tokens(self) -> Tokens:
        """The positions on which the SAE was trained."""
        return cast(Tokens, self.sae.metadata.get("tokens") or "all")

    def place(self, model: VisionModel) -> str:
        """Return the canonical name of the SAE's site in `model`, on which it was trained.

        Raises:
            UserError: the SAE names no site, is of another model, or has no such latent.
        """
        named = self.site or self.sae.metadata.get("site")
        if named is None:
            raise UserError(
                "The SAE whose latents are penalised does not name its site; give site=…."
            )
        site = model.canonical_site(named)
        check_belongs(self.sae, model, site)
        bad = [latent for latent in self.latents if not 0 <= latent < self.sae.n_latents]
        if bad or not self.latents:
            found = f"latent {bad[0]}" if bad else "no latent"
            raise UserError(
                f"{found} cannot be penalised; the SAE has latents 0 to {self.sae.n_latents - 1}."
            )
        return site


@dataclass
class LatentPenalty:
    """Reads activations during a forward pass, under autograd, and penalises latents in them.

    Args:
        model: the model being trained.
        what: the penalised latents.
        site: canonical name of the site.
    """

    model: VisionModel
    what: PenalisedLatents
    site: str
    _seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The caller's own SAE stays on its device, and trainable.
        self._sae = copy.deepcopy(self.what.sae).requires_grad_(False).to(self.model.device)
        self._latents = torch.tensor(sorted(set(self.what.latents)), device=self.model.device)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the site's activations of the next forward pass."""
        self._seen.clear()

        def keep(x: Tensor) -> Tensor:
            self._seen.append(x)
            return x

        with self.model.edit({self.site: keep}):
            yield

    def value(self, rows: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Return the latents' summed activation per vector: `Σ_i r_i Σ_t Σ_l |f_l(x_it)| / (Σ_i r_i
        T)`.

        Args:
            rows: weight of each image, 1 for those that count.
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
