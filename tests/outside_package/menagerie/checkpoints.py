"""A checkpoint format: `menagerie.safetensors` with four tensors, and k in `menagerie.json`."""

from __future__ import annotations

from pathlib import Path

from sparsight.files import write_json
from sparsight.formats import Candidate, Foreign, Format
from sparsight.formats.base import need, whole_number
from sparsight.formats.writing import plain
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.tensor_files import write_safetensors

TENSORS = ("lion.weight", "lion.bias", "lamb.weight", "lamb.bias")
"""Encoder and decoder; a row of either weight is a latent."""


class Menagerie(Format):
    """TopK autoencoders without a normaliser, whose encoder reads x itself."""

    name = "menagerie"
    title = "Menagerie"
    can_save = True

    def recognises(self, found: Candidate) -> bool:
        """By the names of its tensors, which no other project has."""
        return found.find(*TENSORS) is not None

    def load(self, found: Candidate) -> Foreign:
        """Read the tensors, and k."""
        file = found.find(*TENSORS) or ""
        W_enc, b_enc, W_dec, b_dec = need(found.tensors(file), TENSORS, found.name)
        k = whole_number(found.config("menagerie.json"), "k", found.name)
        return Foreign(
            self.name,
            W_enc.shape[1],
            SAEConfig(
                sparsity=TopK(k), normaliser="none", unit_norm_decoder=False, subtract_b_dec=False
            ),
            {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec},
            metadata={"source": found.source(self.name, file)},
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write both files; what this format cannot hold is refused."""
        parts = plain(sae, self.title)
        parts.only(TopK, title=self.title)
        parts.autoencoder_only(self.title)
        tensors = (parts.W_enc, parts.biases(subtracts=False)[0], parts.W_dec, parts.b_dec)
        write_safetensors(
            dict(zip(TENSORS, tensors, strict=True)), folder / "menagerie.safetensors"
        )
        write_json(folder / "menagerie.json", {"k": parts.sparsity.k})
        return folder
