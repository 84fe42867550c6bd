"""Names by effect: which words the image embedding moves toward if a latent is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.errors import UserError
from sparsight.images import ImageSource, sample_places
from sparsight.naming.image_space import ImageSpace, check_words
from sparsight.naming.scores import LatentActivations
from sparsight.naming.text import TextMethod
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.passes import ImagePass, PassSettings

N_IMAGES = 8
"""Images to which each latent is added."""


class Causal(TextMethod):
    """Cosine of the shift of the image embedding with the word, both modalities centred.

    The latent's decoder row, as strong as the latent is in the image where it is strongest, is
    added at the site in a few random images, at the positions that the SAE reads.

    Args:
        space: the collection.
        words: the words.
        vectors: one unit vector per word.
        model: the SAE's own model, with a text tower.
        site: where the SAE reads.
        tokens: the positions that it reads: all, cls or patches.
        source: the collection's images.
        settings: how to load images.
        seed: seed of the random images.

    Raises:
        UserError: the model has no text tower, the SAE is a transcoder or reads means.
    """

    name: ClassVar[str] = "causal"
    plain_name: ClassVar[str] = "cosine"

    def __init__(
        self,
        space: ImageSpace,
        words: Sequence[str],
        vectors: Float[Tensor, "words d"],
        model: VisionModel,
        site: str,
        tokens: str,
        source: ImageSource,
        settings: PassSettings,
        seed: int = 0,
    ) -> None:
        check_words(model)
        if tokens not in _WHERE:
            raise UserError(
                f"The causal method adds a latent at the positions that the SAE reads; this SAE "
                f"reads {tokens!r}, which are no positions. Leave `causal` out."
            )
        super().__init__(space, words, vectors)
        self.model, self.site = model, site
        self._where = _WHERE[tokens](model.n_prefix)
        drawn = sample_places(len(space), N_IMAGES, seed)
        places = sorted(int(space.places[row]) for row in drawn)
        with ImagePass(model, source, None, settings, indices=places) as seen:
            self._pixels = torch.cat([batch.pixels for batch in seen])
        with torch.no_grad():
            self._plain = normalize(model.embed_images(self._pixels), dim=1)

    @torch.no_grad()
    def directions(self, activations: LatentActivations, block: range) -> Float[Tensor, "some d"]:
        """Return the mean shift of the embeddings for each latent, of length 1."""
        sae, offsets = activations.sae, activations.rows.offsets
        if sae.is_transcoder:
            raise UserError("A transcoder's latents write at another site; leave `causal` out.")
        decoder = activations.decoder
        shifts = []
        for row in block:
            values = np.asarray(activations.rows.values[offsets[row] : offsets[row + 1]])
            strength = float(values.max()) if len(values) else 0.0
            edit = self._adding(sae, strength * decoder[row])
            with self.model.edit({self.site: edit}):
                moved = normalize(self.model.embed_images(self._pixels), dim=1)
            shifts.append((moved - self._plain).mean(dim=0).cpu())
        return normalize(torch.stack(shifts), dim=1)

    def _adding(
        self, sae: SparseAutoencoder, change: Float[Tensor, " d_in"]
    ) -> Callable[[Tensor], Tensor]:
        """Return an edit that adds a vector of the SAE's normalised space."""

        def add(x: Float[Tensor, "batch positions d_in"]) -> Tensor:
            here = x[:, self._where]
            vectors = here.flatten(0, 1).to(sae.W_dec)
            frame = sae.normaliser.frame(vectors)
            z = sae.normaliser(vectors, frame) + change
            changed = x.clone()
            back = sae.normaliser.invert(z, frame)
            changed[:, self._where] = back.view(here.shape).to(x)
            return changed

        return add


_WHERE: dict[str, Callable[[int], slice]] = {
    "all": lambda n_prefix: slice(None),
    "cls": lambda n_prefix: slice(0, 1),
    "patches": lambda n_prefix: slice(n_prefix, None),
}
