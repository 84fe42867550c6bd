"""OpenAI's sparse autoencoders: one file with tensors and the name of the activation.

latents = act((LN(x) − pre_bias) encᵀ + latent_bias), x̂ = latents decᵀ + pre_bias, LN undone.
The layer norm exists if and only if the activation is TopK; without `decoder.weight` the weights
are tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, need
from sparsight.pickles import shown
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import AnySparsity, ReLU, TopK

_TENSORS = ("pre_bias", "encoder.weight", "latent_bias")
_DECODERS = ("decoder.weight", "decoder.linear.weight")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_OTHER = ("activation", "activation_state_dict")


class OpenAI(Format):
    """Autoencoders of openai/sparse_autoencoder."""

    name = "openai"
    title = "OpenAI sparse_autoencoder"

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether a file has `pre_bias`, `encoder.weight` and `latent_bias` on top."""
        return candidate.find(*_TENSORS) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the file.

        Raises:
            UserError: the activation is not ReLU, TopK or Identity.
            SparsightError: the file is damaged.
        """
        file = candidate.find(*_TENSORS)
        assert file is not None
        path = candidate.folder / file
        payload, tensors = candidate.payload(file), candidate.tensors(file)
        pre_bias, encoder, latent_bias = need(tensors, _TENSORS, path)
        tied = "decoder.weight" not in tensors
        if encoder.ndim != 2 or (not tied and tensors["decoder.weight"].ndim != 2):
            raise SparsightError(f"{path}: encoder.weight or decoder.weight is not a matrix.")
        n, d_in = encoder.shape
        ours = {"W_enc": encoder, "b_enc": latent_bias, "b_dec": pre_bias}
        if not tied:
            ours["W_dec"] = need(tensors, ("decoder.weight",), path)[0].T
        sparsity, layer_norm = _sparsity(payload, n, path)
        known = {*_TENSORS, *_DECODERS, *_STATISTICS, *_OTHER}
        return Foreign(
            format=self.name,
            d_in=d_in,
            config=SAEConfig(
                n_latents=n,
                sparsity=sparsity,
                normaliser="layer_norm" if layer_norm else "none",
                unit_norm_decoder=False,
                tied=tied,
            ),
            tensors=ours,
            metadata={"source": candidate.source(self.name, file)},
            unknown=tuple(sorted(str(key) for key in payload if key not in known)),
        )


def _sparsity(payload: Mapping[str, Any], n: int, path: Path) -> tuple[AnySparsity, bool]:
    """Return the sparsity, and whether a layer norm precedes it."""
    name = payload.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU(), False
    if name == "Identity":
        return TopK(k=n, rectify=False), False
    if name != "TopK":
        raise UserError(
            f"{path}: the activation is {shown(name)}; known are ReLU, TopK and Identity."
        )
    state = payload.get("activation_state_dict")
    state = state if isinstance(state, Mapping) else {}
    k, after = state.get("k"), state.get("postact_fn", "ReLU")
    if isinstance(k, Tensor) and k.numel() == 1:
        k = int(k)
    if type(k) is not int or not 1 <= k <= n:
        raise SparsightError(f"{path}: the k of its TopK is {shown(k)}, of {n} latents.")
    if after not in ("ReLU", "Identity"):
        raise UserError(
            f"{path}: what follows its TopK is {shown(after)}; known are ReLU and Identity."
        )
    return TopK(k=k, rectify=after == "ReLU"), True
