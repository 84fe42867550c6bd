"""visaebench: `config.json` (or YAML) and `sae.pt` or `model.safetensors`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.files import write_json
from sparsight.formats.base import Candidate, Foreign, Format, need, whole_number
from sparsight.formats.writing import plain
from sparsight.pickles import shown
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import BatchTopK, JumpReLU, ReLU, TopK
from sparsight.tensor_files import write_safetensors

_SIMPLE = ("encoder.weight", "encoder.bias", "decoder.weight")
_LAYERS = ("encoder.final_block.0.weight", "encoder.final_block.0.bias", "dictionary._weights")
_KINDS = ("topk", "batchtopk", "jumprelu")
_CONFIGS = ("config.json", "config.yaml", "config.yml")

_FOLDED = "folded"
"""Our value of "normaliser" in files whose SAE reads vectors as the model gives them."""

_ANSWERED = {
    *("activation", "sae_type", "architecture", "input_dim", "hidden_dim", "k", "threshold"),
    *("expansion_factor", "jump_thresholds", "backbone", "model", "model_name", "layer"),
}


class VisAEBench(Format):
    """TopK, BatchTopK and JumpReLU; unlike in `nn.Linear`, the decoder's rows are latents."""

    name = "visaebench"
    title = "visaebench"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether the configuration's activation and the names of the tensors match."""
        config = candidate.config(*_CONFIGS)
        return (
            _kind(config) in _KINDS and "class" not in config and self._find(candidate) is not None
        )

    def load(self, candidate: Candidate) -> Foreign:
        """Read the configuration and the weights."""
        file, names = self._find(candidate) or ("", _SIMPLE)
        config, tensors = candidate.config(*_CONFIGS), candidate.tensors(file)
        W_enc, b_enc, W_dec = (
            each.to(torch.float32) for each in need(tensors, names, candidate.name)
        )
        used = {*names, "decoder.bias"}
        if names is _LAYERS:
            # Its loader takes these rows as they are: already normalised.
            used.add("dictionary.multiplier")
            W_dec = W_dec * tensors.get("dictionary.multiplier", torch.tensor(0.0)).exp()
        n, d_in = W_enc.shape
        for key, size in (("input_dim", d_in), ("hidden_dim", n)):
            if config.get(key, size) != size:
                raise SparsightError(
                    f"{candidate.name}: {key} is {shown(config[key])}, the weights' {size}."
                )
        read = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
        read["b_dec"] = tensors.get("decoder.bias", torch.zeros(d_in))
        kind = _kind(config)
        sparsity: Any
        if kind == "jumprelu":
            used |= {"jump_thresholds", "thresholds"}
            default = torch.full((n,), 0.01)
            cut = tensors.get("jump_thresholds", tensors.get("thresholds", default))
            sparsity, read["threshold"] = JumpReLU(), cut
        elif kind == "batchtopk":
            used.add("_running_threshold")
            k = whole_number({"k": n, **config}, "k", candidate.name)
            sparsity = BatchTopK(min(k, n))
            read["threshold"] = _threshold(config, tensors, candidate.name)
        else:
            sparsity = TopK(whole_number(config, "k", candidate.name))
        metadata: dict[str, Any] = {"source": candidate.source(self.name, file)}
        model = config.get("model_name") or config.get("model") or config.get("backbone")
        if isinstance(model, str):
            metadata["model"] = {"id": model}
        folded = config.get("normaliser") == _FOLDED
        note = (
            "visaebench trains on standardised activations, and its files hold neither mean nor "
            "deviation: give it such vectors"
        )
        known = _ANSWERED | {"normaliser"} if folded else _ANSWERED
        return Foreign(
            self.name,
            d_in,
            SAEConfig(
                n_latents=n,
                sparsity=sparsity,
                normaliser="none",
                unit_norm_decoder=False,
                subtract_b_dec=False,
            ),
            read,
            metadata=metadata,
            unknown=tuple(sorted({*config} - known)) + tuple(sorted({*tensors} - used)),
            notes=() if folded else (note,),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `config.json` and `model.safetensors`; `visaebench.hub.load_sae` loads them."""
        parts = plain(sae, self.title)
        parts.only(TopK, BatchTopK, ReLU, JumpReLU, title=self.title)
        parts.autoencoder_only(self.title)
        n, sparsity = len(parts.W_enc), parts.sparsity
        tensors = {
            "encoder.weight": parts.W_enc,
            "encoder.bias": parts.biases(subtracts=False)[0],
            "decoder.weight": parts.W_dec,
            "decoder.bias": parts.b_dec,
        }
        config: dict[str, Any] = {"input_dim": parts.d_in, "hidden_dim": n, "normaliser": _FOLDED}
        if isinstance(sparsity, TopK):
            config |= {"activation": "topk", "k": sparsity.k}
        elif isinstance(sparsity, BatchTopK) and parts.threshold is not None:
            config |= {"activation": "batchtopk", "k": sparsity.k}
            config["threshold"] = float(parts.threshold)
        else:
            config["activation"] = "jumprelu"
            zero = torch.zeros(n)
            tensors["jump_thresholds"] = zero if parts.threshold is None else parts.threshold
        write_safetensors(tensors, folder / "model.safetensors")
        write_json(folder / "config.json", config)
        return folder

    @staticmethod
    def _find(candidate: Candidate) -> tuple[str, tuple[str, ...]] | None:
        for names in (_SIMPLE, _LAYERS):
            file = candidate.find(*names)
            if file is not None:
                tensors = candidate.tensors(file)
                if tensors[names[0]].shape == tensors[names[2]].shape:
                    return file, names
        return None


def _kind(config: dict[str, Any]) -> str:
    kind = config.get("activation") or config.get("sae_type") or config.get("architecture")
    return str(kind).lower()


def _threshold(config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> Tensor:
    given = config.get("threshold")
    if given is None and "_running_threshold" in tensors:
        return tensors["_running_threshold"].to(torch.float32).reshape(())
    if given is None:
        given = 0.0
    if not isinstance(given, int | float) or not math.isfinite(given):
        raise SparsightError(f"{where}: threshold is {shown(given)}; expected a finite number.")
    return torch.tensor(float(given))
