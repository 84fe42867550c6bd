"""CLIP-Scope: one file of `torch.save` with `pre_b`, `enc`, `dec`, and k beside them.

The k largest entries of (x − pre_b) enc, whatever their sign, weigh their rows of dec; pre_b is
added. Trained on activations standardised batch by batch; `calibration.py` says what follows from
that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, weights
from sparsight.formats.calibration import Calibration
from sparsight.formats.writing import keeps_negatives, plain, write_torch
from sparsight.pickles import shown
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import TopK

MODEL = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
"""The model of the published ones, which do not name it themselves."""

_KEYS = {"model_state_dict", "n_features", "d_in", "k"}
_KNOWN = {*_KEYS, "token_count", "dead_latents", "n_iter", "log_id", "optimizer_state_dict"}
_TENSORS = {"pre_b", "enc", "dec"}
_PLACE = re.compile(r"(?:^|[^0-9])(\d+)_resid(?:$|[^a-z])")


@dataclass(frozen=True)
class Checkpoint:
    """The checked content of a file."""

    k: int
    pre_b: Tensor
    """[d_in]"""
    enc: Tensor
    """[d_in, n_features]"""
    dec: Tensor
    """[n_features, d_in]"""
    unknown: tuple[str, ...]
    log_id: str


class CLIPScope(Format):
    """Checkpoints of CLIP-Scope (Ewington-Pitsos and Goyal)."""

    name = "clipscope"
    title = "CLIP-Scope"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether `model_state_dict` has the three tensors, with their shape beside it."""
        return self._file(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the file, with the calibration beside it."""
        file = self._file(candidate)
        assert file is not None
        path = candidate.folder / file
        checkpoint = unpack(candidate.payload(file), path)
        assert checkpoint is not None
        d_in, n = checkpoint.enc.shape
        tensors = {
            "W_enc": checkpoint.enc.T,
            "b_enc": torch.zeros(n),
            "W_dec": checkpoint.dec,
            "b_dec": checkpoint.pre_b,
        }
        calibration = Calibration.of(path, d_in)
        if calibration is not None:
            tensors["normaliser.mean"] = calibration.mean
            tensors["normaliser.scale"] = calibration.scale
            note = (
                f"activations are standardised with the mean and deviation in "
                f"{Calibration.beside(path).name} ({calibration.n_vectors:,} vectors)"
            )
        else:
            note = (
                "it was trained on standardised activations, and its file holds neither mean nor "
                "deviation: raw activations are out of its range. Make a calibration "
                "(sparsight.compat.clipscope.TopKSAE.calibrate) and load it again"
            )
        return Foreign(
            format=self.name,
            d_in=d_in,
            config=SAEConfig(
                n_latents=n,
                sparsity=TopK(k=checkpoint.k, rectify=False),
                normaliser="none" if calibration is None else "standardise",
                unit_norm_decoder=False,
            ),
            tensors=tensors,
            metadata={**_belongs(path, checkpoint), "source": candidate.source(self.name, file)},
            unknown=checkpoint.unknown,
            notes=(note,),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `sae.pt`, with the normaliser folded in; the format has no biases of latents.

        Raises:
            UserError: the SAE is not a TopK, or its latents have biases.
        """
        sparsity = sae.config.sparsity
        if not isinstance(sparsity, TopK):
            raise UserError(f"CLIP-Scope's format holds TopK, not {type(sparsity).__name__}.")
        keeps_negatives(sparsity, self.title)
        parts = plain(sae, self.title)
        parts.autoencoder_only(self.title)
        if bool((parts.biases(subtracts=True)[0] != 0).any()):
            raise UserError("CLIP-Scope's format has no biases of latents; b_enc must be 0.")
        payload = {
            "n_features": sae.n_latents,
            "d_in": sae.d_in,
            "k": sparsity.k,
            "model_state_dict": {
                "pre_b": parts.b_dec,
                "enc": parts.W_enc.T.contiguous(),
                "dec": parts.W_dec,
            },
        }
        write_torch(payload, folder / "sae.pt")
        return folder

    @staticmethod
    def _file(candidate: Candidate) -> str | None:
        file = candidate.find(*_KEYS)
        state = None if file is None else candidate.payload(file)["model_state_dict"]
        return file if isinstance(state, Mapping) and set(state) >= _TENSORS else None


def unpack(payload: Any, path: Path) -> Checkpoint | None:
    """Return what a checkpoint holds; None if it is not CLIP-Scope's.

    Args:
        payload: the content of the file.
        path: the file, for messages.

    Raises:
        SparsightError: the tensors do not fit the shape given beside them.
    """
    state = payload.get("model_state_dict") if isinstance(payload, Mapping) else None
    if not isinstance(state, Mapping) or not set(payload) >= _KEYS or not set(state) >= _TENSORS:
        return None
    n, d_in, k = (payload[key] for key in ("n_features", "d_in", "k"))
    if not all(type(number) is int and number >= 1 for number in (n, d_in, k)) or k > n:
        raise SparsightError(f"{path}: n_features, d_in, k are {shown((n, d_in, k))}.")
    wanted = {"pre_b": (d_in,), "enc": (d_in, n), "dec": (n, d_in)}
    tensors = named_tensors(state)
    for key, shape in wanted.items():
        tensor = tensors.get(key)
        actual = type(state[key]).__name__ if tensor is None else tuple(tensor.shape)
        if tensor is None or actual != shape:
            raise SparsightError(f"{path}: {key} is {actual}, expected {shape}.")
        if not torch.isfinite(weights(tensor, key, path)).all():
            raise SparsightError(f"{path}: {key} holds values that are not finite.")
    strange = [str(key) for key in payload if key not in _KNOWN]
    strange += [f"model_state_dict.{key}" for key in state if key not in _TENSORS]
    log_id = payload.get("log_id")
    return Checkpoint(
        k=k,
        pre_b=tensors["pre_b"].float(),
        enc=tensors["enc"].float(),
        dec=tensors["dec"].float(),
        unknown=tuple(sorted(strange)),
        log_id=log_id if isinstance(log_id, str) else "",
    )


def _belongs(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return model, site and tokens; the log or the folder names the block: `22_resid`."""
    place = _PLACE.search(checkpoint.log_id) or _PLACE.search(path.absolute().parent.name)
    if place is None:
        return {}
    about: dict[str, Any] = {"site": f"blocks.{int(place[1])}.resid_post", "tokens": "all"}
    if checkpoint.enc.shape[0] == 1024:
        about["model"] = {"id": MODEL}
    return about
