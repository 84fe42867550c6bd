"""overcomplete: modules pickled as a whole, and state dictionaries."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import write_bytes, write_json
from sparsight.formats.base import (
    Candidate,
    Foreign,
    Format,
    named_tensors,
    weights,
    whole_number,
)
from sparsight.formats.writing import above, plain
from sparsight.pickles import CLASS, shown, tensors_of, text_of
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import BatchTopK, JumpReLU, MatchingPursuit, ReLU, TopK

_CLASSES = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "MpSAE", "RATopKSAE", "RAJumpSAE")

_DICTIONARY = {"dictionary._weights", "dictionary.C"}

_USED = {
    *("encoder.final_block.0.weight", "encoder.final_block.0.bias", "encoder.weight"),
    *("encoder.bias", "encoder.tied_to._weights", "encoder.tied_to.multiplier"),
    *("encoder.tied_to.C", "encoder.tied_to.W", "encoder.tied_to.Relax"),
    *("dictionary._weights", "dictionary.multiplier", "dictionary.C", "dictionary.W"),
    *("dictionary.Relax", "thresholds"),
    *(f"encoder.final_block.1.{part}" for part in ("weight", "bias", "running_mean")),
    *("encoder.final_block.1.running_var", "encoder.final_block.1.num_batches_tracked"),
}


class Overcomplete(Format):
    """SAE, TopKSAE, BatchTopKSAE, JumpSAE, MpSAE; free and archetypal dictionaries.

    A state dictionary does not say how many latents are active, so Sparsight writes (and reads) a
    `config.json` beside it: `{"class": "TopKSAE", "top_k": 32}`.
    """

    name = "overcomplete"
    title = "overcomplete"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether the names inside its dictionary layer match."""
        return self._find(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read a module that was pickled as a whole, without running it, or a state dictionary."""
        file, module, tensors = self._find(candidate) or ("", {}, {})
        tensors = {
            key: weights(each, key, candidate.name).to(torch.float32)
            for key, each in tensors.items()
        }
        config = {} if module else candidate.config("config.json")
        name = text_of(module.get(CLASS) or config.get("class")).rpartition(".")[2]
        if name not in ("", *_CLASSES):
            raise UserError(
                f"{candidate.name}: Sparsight does not support overcomplete's {name[:60]} (class); "
                f"it reads {', '.join(_CLASSES)}."
            )
        notes: list[str] = []
        W_dec = _dictionary(tensors, module, config, candidate.name, notes)
        read = {"W_dec": W_dec, "b_dec": torch.zeros(W_dec.shape[1])}
        pursuit = name == "MpSAE" or not any(key.startswith("encoder.") for key in tensors)
        if pursuit and not _tied(module):
            read |= {"W_enc": W_dec.clone(), "b_enc": torch.zeros(len(W_dec))}
        else:
            read |= _encoder(tensors, module, W_dec, candidate.name)
        sparsity, extra = _sparsity(name, module, config, tensors, candidate.name, notes)
        return Foreign(
            self.name,
            W_dec.shape[1],
            SAEConfig(
                n_latents=len(W_dec),
                sparsity=sparsity,
                normaliser="none",
                unit_norm_decoder=False,
                subtract_b_dec=False,
            ),
            {**read, **extra},
            metadata={"source": candidate.source(self.name, file)},
            unknown=tuple(sorted({*tensors} - _USED)) + tuple(sorted({*config} - _SETTINGS)),
            notes=tuple(notes),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `sae.pt`, a state dictionary, and `config.json`, the arguments of its class.

        The class loads it: `TopKSAE(input_shape, nb_concepts, top_k=…,
        dictionary_params={"normalization": "identity"}).load_state_dict(torch.load("sae.pt"))`.
        BatchTopK becomes JumpSAE, because a state dictionary has no place for its threshold.
        """
        parts = plain(sae, self.title)
        parts.only(TopK, BatchTopK, ReLU, JumpReLU, MatchingPursuit, title=self.title)
        parts.autoencoder_only(self.title)
        if bool((parts.b_dec != 0).any()):
            raise UserError(
                f"{self.title} has no bias of the decoder, and this SAE has one (b_dec with the "
                "mean of its normaliser). Save it in another format, such as visaebench."
            )
        n, sparsity = len(parts.W_enc), parts.sparsity
        tensors = {"dictionary._weights": parts.W_dec, "dictionary.multiplier": torch.tensor(0.0)}
        if not isinstance(sparsity, MatchingPursuit):
            tensors["encoder.final_block.0.weight"] = parts.W_enc
            tensors["encoder.final_block.0.bias"] = parts.b_enc
        config: dict[str, Any] = {
            "class": "SAE",
            "input_shape": parts.d_in,
            "nb_concepts": n,
            "dictionary_params": {"normalization": "identity"},
        }
        if isinstance(sparsity, TopK):
            config |= {"class": "TopKSAE", "top_k": sparsity.k}
        elif isinstance(sparsity, MatchingPursuit):
            if sparsity.tolerance > 0 or sparsity.stop_on_repeat:
                raise UserError(f"{self.title}'s matching pursuit takes all of its steps.")
            config |= {"class": "MpSAE", "k": sparsity.k}
        elif parts.threshold is not None:
            config["class"] = "JumpSAE"
            threshold = parts.threshold
            if isinstance(sparsity, BatchTopK):
                threshold = above(threshold)
            # It stores logarithms; a threshold of 0 or less lets every positive value pass.
            tensors["thresholds"] = threshold.expand(n).clamp(min=1e-37).log().contiguous()
        file = io.BytesIO()
        torch.save(tensors, file)
        write_bytes(folder / "sae.pt", file.getvalue())
        write_json(folder / "config.json", config)
        return folder

    @staticmethod
    def _find(candidate: Candidate) -> tuple[str, dict[str, Any], dict[str, Tensor]] | None:
        """Return the file, the module if the whole was pickled (or nothing), and the tensors."""
        for file in candidate.weights:
            payload = candidate.payload(file)
            module = payload if isinstance(payload, dict) and "_modules" in payload else {}
            tensors = named_tensors(tensors_of(module)) if module else candidate.tensors(file)
            if _DICTIONARY & {*tensors}:
                return file, module, tensors
        return None


_SETTINGS = {"class", "input_shape", "nb_concepts", "dictionary_params", "top_k", "k", "delta"}
_SETTINGS |= {"running_threshold"}


def _dictionary(
    tensors: dict[str, Tensor],
    module: dict[str, Any],
    config: dict[str, Any],
    where: str,
    notes: list[str],
) -> Tensor:
    """Return the dictionary as its layer computes it."""
    layer = (module.get("_modules") or {}).get("dictionary") or {}
    fused = layer.get("_fused_dictionary")
    if isinstance(fused, Tensor) and layer.get("training") is False:
        return fused.float()
    multiplier = tensors.get("dictionary.multiplier", torch.tensor(0.0)).exp()
    if "dictionary.C" in tensors:
        missing = [key for key in ("W", "Relax") if f"dictionary.{key}" not in tensors]
        if missing:
            raise SparsightError(f"{where}: dictionary.{missing[0]} is missing.")
        delta = layer.get("delta", config.get("delta"))
        if delta is None:
            delta = 1.0
            notes.append("delta, the radius of the relaxation, is not in the file: taken as 1")
        # Fel et al. 2025, "Archetypal SAE", equation 4: convex weights, and a relaxation of
        # bounded norm.
        weights = tensors["dictionary.W"].relu()
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
        relaxation = tensors["dictionary.Relax"]
        radius = relaxation.norm(dim=-1, keepdim=True)
        relaxation = relaxation * (float(delta) / radius).clamp(max=1)
        mixed: Tensor = (weights @ tensors["dictionary.C"] + relaxation) * multiplier
        return mixed
    rows = tensors["dictionary._weights"]
    params = config.get("dictionary_params") or {}
    if not isinstance(params, dict):
        raise SparsightError(f"{where}: dictionary_params is {shown(params)}; expected an object.")
    given = layer.get("normalization", params.get("normalization"))
    kind = "l2" if given is None else text_of(given).rpartition(".")[2].removeprefix("normalize_")
    if given is None and not module:
        notes.append(
            "how its dictionary is normalised is not in the file: taken as its default, l2"
        )
    if kind not in ("l2", "l1", "max_l2", "max_l1", "identity"):
        raise UserError(
            f"{where}: the normalization of its dictionary is {shown(given)}, which is unknown."
        )
    if kind != "identity":
        norms = rows.norm(p=int(kind[-1]), dim=1, keepdim=True)
        rows = rows / (norms.max() if kind.startswith("max_") else norms + 1e-8)
    return rows * multiplier


def _encoder(
    tensors: dict[str, Tensor], module: dict[str, Any], W_dec: Tensor, where: str
) -> dict[str, Tensor]:
    """Return a linear encoder, with any batch norm (which is linear at inference) folded in."""
    encoder = (module.get("_modules") or {}).get("encoder") or {}
    if "encoder.final_block.0.weight" not in tensors:
        tied = _tied(module) or "encoder.weight" not in tensors
        bias = tensors.get("encoder.bias")
        return {
            "W_enc": W_dec.clone() if tied else tensors["encoder.weight"],
            "b_enc": torch.zeros(len(W_dec)) if bias is None else bias,
        }
    deeper = [key for key in tensors if key.startswith("encoder.") and key not in _USED]
    if deeper or (encoder.get("_modules") or {}).get("mlp_blocks", {}).get("_modules"):
        raise UserError(
            f"{where}: its encoder has more than one layer ({', '.join(deeper[:3])}); Sparsight's "
            "encoders are linear."
        )
    activation = (encoder.get("_modules") or {}).get("final_activation", {}).get(CLASS, "ReLU")
    if text_of(activation).rpartition(".")[2] != "ReLU":
        raise UserError(f"{where}: its encoder ends with {shown(activation)}; expected ReLU.")
    W_enc = tensors["encoder.final_block.0.weight"]
    b_enc = tensors.get("encoder.final_block.0.bias", torch.zeros(len(W_enc)))
    norm = {key: tensors.get(f"encoder.final_block.1.{key}") for key in ("weight", "bias")}
    mean = tensors.get("encoder.final_block.1.running_mean")
    variance = tensors.get("encoder.final_block.1.running_var")
    if mean is not None and variance is not None:
        block = (encoder.get("_modules") or {}).get("final_block", {}).get("_modules") or {}
        gain = (variance + float((block.get("1") or {}).get("eps", 1e-5))).rsqrt()
        if norm["weight"] is not None:
            gain = gain * norm["weight"]
        shift = norm["bias"] if norm["bias"] is not None else torch.zeros_like(mean)
        return {"W_enc": W_enc * gain[:, None], "b_enc": (b_enc - mean) * gain + shift}
    if norm["weight"] is not None:
        raise UserError(f"{where}: its encoder ends with a layer norm, which is not supported.")
    return {"W_enc": W_enc, "b_enc": b_enc}


def _sparsity(
    name: str,
    module: dict[str, Any],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    where: str,
    notes: list[str],
) -> tuple[Any, dict[str, Tensor]]:
    """Return the sparsity, from the class's name or, if there is none, from the tensors."""
    if "Q" in tensors:
        raise UserError(f"{where}: quantised SAEs (QSAE) are not supported.")
    n = len(tensors.get("dictionary._weights", tensors.get("dictionary.W", torch.zeros(0))))
    about = module or config
    if "thresholds" in tensors:
        return JumpReLU(), {"threshold": tensors["thresholds"].exp()}
    if name == "SAE":
        return ReLU(), {}
    if name == "MpSAE":
        return MatchingPursuit(whole_number(about, "k", where)), {}
    if name in ("TopKSAE", "RATopKSAE"):
        return TopK(min(whole_number(about, "top_k", where), n)), {}
    if name == "BatchTopKSAE":
        threshold = about.get("running_threshold")
        if not isinstance(threshold, Tensor | float | int):
            raise UserError(
                f"{where}: a BatchTopKSAE's running_threshold is not in its state dictionary. "
                'Save the module whole, or add "running_threshold" to config.json.'
            )
        # Its top_k counts all latents of a batch of unknown size, so k per vector is unknown.
        notes.append("written as JumpReLU: its top_k belongs to a batch of unknown size")
        cut = torch.as_tensor(threshold, dtype=torch.float32).reshape(())
        return JumpReLU(), {"threshold": above(cut).expand(n)}
    raise UserError(
        f"{where}: a state dictionary of overcomplete does not state its class and top_k. Save the "
        'module whole, or put a config.json beside it: {"class": "TopKSAE", "top_k": 32}.'
    )


def _tied(module: dict[str, Any]) -> bool:
    encoder = (module.get("_modules") or {}).get("encoder") or {}
    return "tied_to" in (encoder.get("_modules") or {})
