"""EleutherAI sparsify (eai-sparsify): `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsight.errors import SparsightError, UserError
from sparsight.files import write_json
from sparsight.formats.base import Candidate, Foreign, Format, need, whole_number
from sparsight.formats.sites import site_of_module
from sparsight.formats.writing import plain
from sparsight.pickles import shown
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import AbsTopK, GroupMax, TopK
from sparsight.tensor_files import write_safetensors

_WEIGHTS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_ANSWERED = {"activation", "d_in", "expansion_factor", "k", "num_latents", "signed"}
_ANSWERED |= {"transcode", "skip_connection"}
_TRAINING = {"normalize_decoder", "multi_topk"}


class Sparsify(Format):
    """TopK (signed in old files) and GroupMax; SAEs, and transcoders with equal widths."""

    name = "sparsify"
    title = "EleutherAI sparsify"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether the names match: a layer `encoder`, but bare `W_dec` and `b_dec`."""
        return candidate.find(*_WEIGHTS) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read `cfg.json` and the weights beside it."""
        file = candidate.find(*_WEIGHTS) or ""
        config, tensors = candidate.config("cfg.json", "config.json"), candidate.tensors(file)
        W_enc, b_enc, W_dec, b_dec = (
            each.to(torch.float32) for each in need(tensors, _WEIGHTS, candidate.name)
        )
        d_in = W_enc.shape[-1]
        if "k" not in config:
            raise UserError(f"{candidate.name}: needs cfg.json with k beside {file}.")
        if config.get("d_in", d_in) != d_in:
            raise SparsightError(
                f"{candidate.name}: d_in is {shown(config['d_in'])}, encoder.weight {d_in}."
            )
        transcode = bool(config.get("transcode", False))
        skip = tensors.get("W_skip")
        read = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if skip is not None:
            read["W_skip"] = skip
            if not transcode:
                # Here only transcoders, whose encoders read x itself, have a skip connection.
                read["b_enc"] = (b_enc.double() - W_enc.double() @ b_dec.double()).float()
                transcode = True
        site = site_of_module(candidate.folder.name)
        return Foreign(
            self.name,
            d_in,
            SAEConfig(
                n_latents=len(W_enc),
                sparsity=_sparsity(config, candidate.name),
                normaliser="none",
                unit_norm_decoder=bool(config.get("normalize_decoder", True)),
                subtract_b_dec=not transcode,
                skip=skip is not None,
            ),
            read,
            d_out=W_dec.shape[-1] if transcode else None,
            metadata={
                **({"site": site} if site else {}),
                "source": candidate.source(self.name, file),
            },
            unknown=tuple(sorted({*config} - _ANSWERED - _TRAINING))
            + tuple(sorted({*tensors} - {*_WEIGHTS, "W_skip"})),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `cfg.json` and `sae.safetensors`; `SparseCoder.load_from_disk` loads them."""
        parts = plain(sae, self.title)
        parts.only(TopK, GroupMax, title=self.title)
        transcode = parts.d_out is not None
        if transcode and parts.d_out != parts.d_in:
            raise UserError(
                f"{self.title} has no transcoders from {parts.d_in} to {parts.d_out} dimensions: "
                "both must be equal."
            )
        tensors = {
            "encoder.weight": parts.W_enc,
            "encoder.bias": parts.biases(subtracts=not transcode)[0],
            "W_dec": parts.W_dec,
            "b_dec": parts.b_dec,
        }
        if parts.W_skip is not None:
            tensors["W_skip"] = parts.W_skip
        write_safetensors(tensors, folder / "sae.safetensors")
        write_json(
            folder / "cfg.json",
            {
                "activation": "groupmax" if isinstance(parts.sparsity, GroupMax) else "topk",
                "expansion_factor": max(1, len(parts.W_enc) // parts.d_in),
                "normalize_decoder": False,
                "num_latents": len(parts.W_enc),
                "k": parts.sparsity.k,
                "multi_topk": False,
                "skip_connection": parts.W_skip is not None,
                "transcode": transcode,
                "d_in": parts.d_in,
            },
        )
        return folder


def _sparsity(config: dict[str, Any], where: str) -> TopK | AbsTopK | GroupMax:
    activation, k = config.get("activation", "topk"), whole_number(config, "k", where)
    if activation == "groupmax":
        return GroupMax(k)
    if activation != "topk":
        raise UserError(
            f"{where}: activation is {shown(activation)}; Sparsight knows topk, groupmax."
        )
    # Older versions have `signed`: the largest in absolute value, not rectified.
    return AbsTopK(k) if config.get("signed", False) else TopK(k)
