"""dictionary_learning (saprmarks, and forks such as sae-for-vlm): `ae.pt` and `config.json`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import write_bytes, write_json
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, need, whole_number
from sparsight.formats.writing import above, at_least, plain
from sparsight.pickles import shown, text_of
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK

_LINEAR = {"encoder.weight", "decoder.weight"}
_BARE = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}

_CLASSES = {
    "AutoEncoder": (*_LINEAR, "encoder.bias", "bias"),
    "AutoEncoderNew": (*_LINEAR, "encoder.bias", "decoder.bias"),
    "GatedAutoEncoder": (*_LINEAR, "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "AutoEncoderTopK": (*_LINEAR, "encoder.bias", "b_dec"),
    "BatchTopKSAE": (*_LINEAR, "encoder.bias", "b_dec"),
    "JumpReluAutoEncoder": tuple(sorted(_BARE)),
    "MatryoshkaBatchTopKSAE": (*sorted(_BARE), "k", "group_sizes"),
}
"""The names of each class's tensors; two classes share the same names."""

_NONE = torch.zeros(0)

_SPELT = {
    "MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE",
    "MatryoshkaSAE": "MatryoshkaBatchTopKSAE",
}

_ANSWERED = {
    *("dict_class", "trainer_class", "activation_dim", "dict_size", "k", "layer", "lm_name"),
    *("submodule_name", "group_sizes", "group_fractions", "norm_factor"),
    # About training.
    *("lr", "steps", "seed", "device", "wandb_name", "auxk_alpha", "warmup_steps", "decay_start"),
    *("threshold_beta", "threshold_start_step", "top_k_aux", "group_weights", "l1_penalty"),
    *("sparsity_warmup_steps", "resample_steps", "sparsity_penalty", "bandwidth", "target_l0"),
    *("l1_warmup_steps", "initial_sparsity_penalty", "sparsity_function", "p_start", "p_end"),
    *("sparsity_queue_length", "anneal_start", "anneal_end", "n_sparsity_updates", "sae_class"),
}


class DictionaryLearning(Format):
    """ReLU, TopK, BatchTopK (Matryoshka), JumpReLU and gated SAEs."""

    name = "dictionary_learning"
    title = "dictionary_learning"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether names match a class's, and orientations where others share the names."""
        return self._find(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read `ae.pt`, and `config.json` beside it or, for checkpoints, in the folder above."""
        file, tensors, possible = self._find(candidate) or ("", {}, [])
        payload = candidate.payload(file)
        whole = candidate.config("config.json", "../config.json")
        inside = payload.get("config") if isinstance(payload, dict) else None
        config = whole.get("trainer") or (inside if isinstance(inside, dict) else {})
        if not isinstance(config, dict):
            raise SparsightError(f"{candidate.name}: trainer in config.json is not an object.")
        name = _class(config, possible, candidate.name)
        wanted = _CLASSES[name]
        given = dict(zip(wanted, need(tensors, wanted, candidate.name), strict=True))
        given = {key: tensor.to(torch.float32) for key, tensor in given.items()}
        read: dict[str, Tensor] = {}
        notes: list[str] = []
        subtracts = True
        sparsity: ReLU | Gated | JumpReLU | TopK | BatchTopK
        if "W_enc" in given:
            read |= {key: given[key] for key in ("b_enc", "W_dec", "b_dec")}
            read["W_enc"] = given["W_enc"].mT
        else:
            bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
            read = {"W_enc": given["encoder.weight"], "W_dec": given["decoder.weight"].mT}
            if name == "GatedAutoEncoder":
                read |= {"r_mag": given["r_mag"], "b_mag": given["mag_bias"]}
                read |= {"b_enc": given["gate_bias"], "b_dec": given["decoder_bias"]}
            else:
                read |= {"b_enc": given["encoder.bias"], "b_dec": given[bias]}
        metadata = _about(config)
        if name in ("AutoEncoder", "AutoEncoderNew"):
            sparsity, subtracts = ReLU(), name == "AutoEncoder"
            if name == "AutoEncoder":
                read, scaled = _unit_rows(read)
                if scaled:
                    notes.append(
                        "as the package's own loader does: rows of the decoder have norm 1, and "
                        "activations are those of the file times the norms"
                    )
        elif name == "GatedAutoEncoder":
            sparsity = Gated()
        elif name == "JumpReluAutoEncoder":
            sparsity, subtracts = JumpReLU(), False
            read["threshold"] = given["threshold"]
        else:
            inside = {"k": int(tensors["k"])} if tensors.get("k", _NONE).numel() == 1 else {}
            k = whole_number({**config, **inside}, "k", candidate.name)
            sparsity = TopK(k) if name == "AutoEncoderTopK" else BatchTopK(k)
            if name != "AutoEncoderTopK":
                (threshold,) = need(tensors, ("threshold",), candidate.name)
                read["threshold"] = at_least(threshold.to(torch.float32).reshape(()))
                if threshold < 0:
                    notes.append("its threshold was never set: every positive value is active")
            if "group_sizes" in tensors:
                metadata["group_sizes"] = tensors["group_sizes"].tolist()
        known = {*wanted, "k", "threshold", "group_sizes"}
        if tensors.keys() != candidate.tensors(file).keys() and (factor := _norm(payload)):
            # A checkpoint during a run: trainSAE multiplies only the biases that it saves last.
            read = _rescaled(read, factor)
            notes.append(f"biases are multiplied by its norm_factor, {factor:.6g}")
        return Foreign(
            self.name,
            read["W_enc"].shape[-1],
            SAEConfig(
                n_latents=len(read["W_enc"]),
                sparsity=sparsity,
                normaliser="none",
                unit_norm_decoder=False,
                subtract_b_dec=subtracts,
            ),
            read,
            metadata={**metadata, "source": candidate.source(self.name, file)},
            unknown=tuple(sorted({*config} - _ANSWERED)) + tuple(sorted({*tensors} - known)),
            notes=tuple(notes),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `ae.pt` and `config.json`; `dictionary_learning.utils.load_dictionary` loads them.

        ReLU is written as AutoEncoderNew, whose loader keeps the norms of the decoder.
        """
        parts = plain(sae, self.title)
        parts.only(ReLU, TopK, BatchTopK, JumpReLU, Gated, title=self.title)
        parts.autoencoder_only(self.title)
        sparsity = parts.sparsity
        linear = {"encoder.weight": parts.W_enc, "decoder.weight": parts.W_dec.T.contiguous()}
        b_enc, b_mag = parts.biases(subtracts=isinstance(sparsity, TopK | BatchTopK | Gated))
        tensors: dict[str, Tensor]
        if isinstance(sparsity, ReLU):
            name = "AutoEncoderNew"
            tensors = {**linear, "encoder.bias": b_enc, "decoder.bias": parts.b_dec}
        elif isinstance(sparsity, JumpReLU) and parts.threshold is not None:
            name = "JumpReluAutoEncoder"
            tensors = {"W_enc": parts.W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": parts.W_dec}
            tensors |= {"b_dec": parts.b_dec, "threshold": parts.threshold}
        elif isinstance(sparsity, Gated) and b_mag is not None and parts.r_mag is not None:
            name = "GatedAutoEncoder"
            tensors = {**linear, "decoder_bias": parts.b_dec, "r_mag": parts.r_mag}
            tensors |= {"gate_bias": b_enc, "mag_bias": b_mag}
        else:
            name = "BatchTopKSAE" if isinstance(sparsity, BatchTopK) else "AutoEncoderTopK"
            unset = torch.tensor(-1.0)
            tensors = {**linear, "encoder.bias": b_enc, "b_dec": parts.b_dec}
            tensors |= {"k": torch.tensor(sparsity.k, dtype=torch.int)}
            tensors["threshold"] = unset if parts.threshold is None else above(parts.threshold)
        trainer: dict[str, Any] = {
            "dict_class": name,
            "activation_dim": parts.d_in,
            "dict_size": len(parts.W_enc),
            "layer": None,
            "lm_name": (sae.metadata.get("model") or {}).get("id", ""),
            "submodule_name": sae.metadata.get("site", ""),
        }
        if "k" in tensors:
            trainer["k"] = sparsity.k
        file = io.BytesIO()
        torch.save(tensors, file)
        write_bytes(folder / "ae.pt", file.getvalue())
        write_json(folder / "config.json", {"trainer": trainer})
        return folder

    @staticmethod
    def _find(candidate: Candidate) -> tuple[str, dict[str, Tensor], list[str]] | None:
        """Return the file, its tensors, and the classes that have tensors with these names."""
        for file in candidate.weights:
            payload = candidate.payload(file)
            inside = payload.get("ae") if isinstance(payload, dict) else None
            tensors = candidate.tensors(file)
            if isinstance(inside, dict):
                tensors = named_tensors(inside)
            possible = [
                name
                for name, keys in _CLASSES.items()
                if {*keys} <= {*tensors} and _oriented(name, tensors)
            ]
            # A class may have the tensors of a smaller one and more.
            most = max((len(_CLASSES[name]) for name in possible), default=0)
            possible = [name for name in possible if len(_CLASSES[name]) == most]
            if possible:
                return file, tensors, possible
        return None


def _oriented(name: str, tensors: dict[str, Tensor]) -> bool:
    """Return whether the decoder is as in `nn.Linear`, and the number of thresholds is right."""
    if "W_enc" in _CLASSES[name]:
        scalar = tensors["threshold"].ndim == 0
        matryoshka = name == "MatryoshkaBatchTopKSAE"
        transposed = tensors["W_enc"].shape[::-1] == tensors["W_dec"].shape
        return scalar == matryoshka and transposed
    return tensors["encoder.weight"].shape[::-1] == tensors["decoder.weight"].shape


def _class(config: dict[str, Any], possible: list[str], where: str) -> str:
    name = config.get("dict_class")
    name = _SPELT.get(text_of(name), name)
    if name in possible:
        return str(name)
    if name is None and len(possible) == 1:
        return possible[0]
    if name is None:
        raise UserError(
            f"{where}: {' and '.join(possible)} have the same tensors, and no config.json says "
            'which it is. Put one beside the file: {"trainer": {"dict_class": "BatchTopKSAE", '
            '"k": 32}}.'
        )
    raise UserError(
        f"{where}: dict_class is {shown(name)}, but the tensors are those of "
        f"{' or '.join(possible)}."
    )


def _unit_rows(read: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    norms = read["W_dec"].norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)) or not bool((norms > 0).all()):
        return read, False
    return {
        **read,
        "W_dec": read["W_dec"] / norms[:, None],
        "W_enc": read["W_enc"] * norms[:, None],
        "b_enc": read["b_enc"] * norms,
    }, True


def _norm(payload: Any) -> float | None:
    factor = payload.get("norm_factor") if isinstance(payload, dict) else None
    return float(factor) if isinstance(factor, int | float) and factor > 0 else None


def _rescaled(read: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Multiply all biases and thresholds by the factor, for activations not divided by it."""
    biases = {"b_enc", "b_dec", "b_mag", "threshold"}
    return {key: tensor * factor if key in biases else tensor for key, tensor in read.items()}


def _about(config: dict[str, Any]) -> dict[str, Any]:
    belongs: dict[str, Any] = {}
    model, layer = config.get("lm_name"), config.get("layer")
    module = text_of(config.get("submodule_name"))
    if isinstance(model, str) and model:
        belongs["model"] = {"id": model}
    if module.startswith("blocks.") or module in ("embedding", "final_norm"):
        belongs["site"] = module
    elif module == "post_projection":
        belongs["site"] = "embedding"
    elif isinstance(layer, int) and layer >= 0 and (not module or module.startswith("resid_post")):
        belongs["site"] = f"blocks.{layer}.resid_post"
    return belongs
