"""SAELens, version 6 and before: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import write_json
from sparsight.formats.base import Candidate, Foreign, Format, need, weights, whole_number
from sparsight.formats.sites import hook_of_site, site_of_hook
from sparsight.formats.writing import Plain, above, at_least, plain
from sparsight.pickles import shown
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import (
    AbsTopK,
    AnySparsity,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    TopK,
)
from sparsight.tensor_files import write_safetensors

_MARKS = {"apply_b_dec_to_input", "sae_lens_training_version", "architecture", "activation_fn_str"}
_MARKS |= {"activation_fn", "finetuning_scaling_factor"}

_NORMS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
_TRANSCODERS = {
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
}
_JUMPS = {"jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"}
_BATCHES = {"batchtopk", "matryoshka_batchtopk"}
_K_LARGEST = {"topk", "abstopk", *_BATCHES}

_KNOWN = {
    *("d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "architecture", "k"),
    *("normalize_activations", "reshape_activations", "metadata", "activation_fn"),
    *("rescale_acts_by_decoder_norm", "activation_fn_kwargs", "finetuning_scaling_factor"),
    *("hook_name", "hook_layer", "hook_head_index", "model_name", "hook_name_out"),
    *("residual_threshold", "max_iterations", "stop_on_duplicate_support"),
    # About the text that it was trained on, its training, and versions.
    *("prepend_bos", "context_size", "dataset_path", "dataset_trust_remote_code", "model_class"),
    *("model_from_pretrained_kwargs", "neuronpedia_id", "seqpos_slice", "sae_lens_version"),
    *("sae_lens_training_version", "exclude_special_tokens", "sparsity", "seed"),
    *("decoder_init_norm", "noise", "use_sparse_activations", "aux_loss_coefficient"),
    *("topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss", "l1_coefficient"),
    *(
        "l0_coefficient",
        "l1_warm_up_steps",
        "l0_warm_up_steps",
        "lp_norm",
        "mse_loss_normalization",
    ),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"),
    *("pre_act_loss_coefficient", "tanh_scale", "jumprelu_tanh_scale", "decoder_heuristic_init"),
    *(
        "init_encoder_as_decoder_transpose",
        "normalize_sae_decoder",
        "l1_loss_type",
        "hook_layer_out",
    ),
}
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


@dataclass
class _Reading:
    """A checkpoint that is being translated, part by part."""

    candidate: Candidate
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """Tensors of the file, float32, by SAELens' names."""
    settings: dict[str, Any] = field(
        default_factory=lambda: {"normaliser": "none", "subtract_b_dec": False}
    )
    """Arguments of `SAEConfig`."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by our names; rows are latents."""
    used: set[str] = field(default_factory=lambda: {"W_enc", "W_dec", "b_dec", "b_enc"})
    """Tensors of the file that were understood."""
    notes: list[str] = field(default_factory=list)

    @property
    def architecture(self) -> Any:
        return self.config["architecture"]

    @property
    def transcodes(self) -> bool:
        return self.architecture in _TRANSCODERS

    def read_normaliser(self) -> None:
        kind = self.config.get("normalize_activations") or "none"
        if kind in _NORMS:
            self.settings["normaliser"] = _NORMS[kind]
        elif kind == "expected_average_only_in":
            d_in = self.config["d_in"]
            self.parts |= _scaling(self.candidate, d_in, self.settings, self.notes)
        else:
            raise UserError(
                f"{self.candidate.name}: normalize_activations is {shown(kind)}, which Sparsight "
                f"cannot undo from this file. It reads {', '.join(_NORMS)} and "
                "expected_average_only_in."
            )

    def read_weights(self) -> None:
        W_dec, b_dec = self._need("W_dec", "b_dec")
        if self.architecture == "matching_pursuit":
            W_enc, b_enc = W_dec.mT, torch.zeros(W_dec.shape[0])
            if not self.config.get("apply_b_dec_to_input", True):
                b_dec = torch.zeros_like(b_dec)
        elif self.architecture == "gated":
            W_enc, b_enc = self._need("W_enc", "b_gate")
            self.used.add("b_gate")
        else:
            W_enc, b_enc = self._need("W_enc", "b_enc")
        if "scaling_factor" in self.tensors:
            # Fine-tuned decoders multiply each activation by it before they read it.
            self.used.add("scaling_factor")
            W_dec = W_dec * self.tensors["scaling_factor"][:, None]
        # Training configurations do so by default; files that say nothing do not.
        rescales = self.config.get("rescale_acts_by_decoder_norm", False)
        if rescales and self.architecture in _K_LARGEST:
            W_enc, b_enc, W_dec = _rescaled(W_enc, b_enc, W_dec)
            self.notes.append("the norms of the decoder's rows are folded into the encoder")
        self.parts |= {"W_enc": W_enc.mT, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}

    def read_sparsity(self) -> None:
        name, architecture = self.candidate.name, self.architecture
        if architecture == "matching_pursuit":
            self.settings |= {"subtract_b_dec": True, "sparsity": _pursuit(self.config, name)}
        elif architecture == "gated":
            self.parts["r_mag"], self.parts["b_mag"] = self._need("r_mag", "b_mag")
            self.used |= {"r_mag", "b_mag"}
            self.settings["sparsity"] = Gated()
        elif architecture in _K_LARGEST:
            self.settings["sparsity"] = self._k_largest()
        elif architecture in _JUMPS:
            self.used |= {"threshold", "log_threshold"}
            if "threshold" not in self.tensors and "log_threshold" in self.tensors:
                self.parts["threshold"] = self.tensors["log_threshold"].exp()
            else:
                (self.parts["threshold"],) = self._need("threshold")
            self.settings["sparsity"] = JumpReLU()
        elif architecture in ("standard", "transcoder", "skip_transcoder"):
            activation = self.config.get("activation_fn", "relu")
            if activation != "relu":
                raise UserError(f"{name}: activation_fn is {shown(activation)}; expected relu.")
            self.settings["sparsity"] = ReLU()
        else:
            raise UserError(
                f"{name}: SAELens' {shown(architecture)} is not supported by Sparsight "
                "(architecture)."
            )

    def _k_largest(self) -> AnySparsity:
        k = self.config.get("k")
        if not isinstance(k, int | float) or k < 1:
            raise SparsightError(
                f"{self.candidate.name}: k is {shown(k)}; expected a number of 1 or more."
            )
        if self.architecture in _BATCHES:
            (threshold,) = self._need("topk_threshold")
            self.used.add("topk_threshold")
            self.parts["threshold"] = at_least(threshold.reshape(()))
        k = max(1, round(k))
        if self.architecture in _BATCHES:
            return BatchTopK(k)
        return TopK(k) if self.architecture == "topk" else AbsTopK(k)

    def read_transcoder(self) -> None:
        if self.transcodes and self.settings["normaliser"] != "none":
            raise UserError(
                f"{self.candidate.name}: a transcoder of which only the input is normalised by "
                f"{shown(self.config.get('normalize_activations'))} is not supported."
            )
        if self.transcodes and "W_skip" in self.tensors:
            self.used.add("W_skip")
            self.settings["skip"], self.parts["W_skip"] = True, self.tensors["W_skip"]
        if not self.transcodes and self.config.get("apply_b_dec_to_input", True):
            self.settings["subtract_b_dec"] = True
        if self.config.get("reshape_activations", "none") == "hook_z":
            self.notes.append("it reads the heads' outputs side by side: [batch, heads · width]")

    def _need(self, *names: str) -> list[Tensor]:
        return need(self.tensors, names, self.candidate.name)


class SAELens(Format):
    """Standard, TopK, AbsTopK, JumpReLU, gated, (skip) transcoders, matching pursuit."""

    name = "saelens"
    title = "SAELens"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether there are `W_dec` and `b_dec`, and SAELens' fields in `cfg.json`."""
        config = candidate.config("cfg.json", "config.json")
        marked = {"d_in", "d_sae"} <= {*config} and bool(_MARKS & {*config})
        return marked and self._file(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read `cfg.json` and the weights beside it."""
        file = self._file(candidate) or ""
        config = _modern(candidate.config("cfg.json", "config.json"), candidate.name)
        tensors = {
            key: weights(tensor, key, candidate.name).to(torch.float32)
            for key, tensor in candidate.tensors(file).items()
        }
        reading = _Reading(candidate, config, tensors)
        reading.read_normaliser()
        reading.read_weights()
        reading.read_sparsity()
        reading.read_transcoder()
        d_out = reading.parts["W_dec"].shape[-1] if reading.transcodes else None
        return Foreign(
            self.name,
            config["d_in"],
            SAEConfig(
                n_latents=reading.parts["W_dec"].shape[0],
                unit_norm_decoder=False,
                **reading.settings,
            ),
            reading.parts,
            d_out=d_out,
            metadata={
                **_about({**config, **(config.get("metadata") or {})}),
                "source": candidate.source(self.name, file),
            },
            unknown=tuple(sorted({*config} - _KNOWN)) + tuple(sorted({*tensors} - reading.used)),
            notes=tuple(reading.notes),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors`; `SAE.load_from_disk` loads them.

        BatchTopK becomes JumpReLU, as in SAELens' own export.
        """
        # Its transcoders leave their output as it is, without a scale.
        per_vector = () if sae.is_transcoder else ("layer_norm", "constant_norm")
        parts = plain(sae, self.title, per_vector=per_vector)
        transcodes = parts.d_out is not None
        if transcodes:
            parts.only(ReLU, JumpReLU, BatchTopK, title=f"{self.title}, for transcoders,")
        else:
            parts.only(
                *(TopK, AbsTopK, BatchTopK, ReLU, JumpReLU, Gated, MatchingPursuit),
                title=self.title,
            )
            parts.autoencoder_only(f"{self.title}, for SAEs that are no transcoders,")
        pursues = isinstance(parts.sparsity, MatchingPursuit)
        if pursues and not parts.subtracts and bool((parts.b_dec != 0).any()):
            raise UserError(
                f"{self.title}'s matching pursuit starts from x − b_dec, but this SAE's starts "
                "from x (subtract_b_dec=False), and b_dec is not 0."
            )
        config, tensors = _parts(parts)
        n = len(parts.W_enc)
        about = sae.metadata
        metadata = {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "model_name": (about.get("model") or {}).get("id"),
            "hook_name": hook_of_site(about.get("site")) or about.get("site"),
        }
        norms = {ours: theirs for theirs, ours in _NORMS.items()}
        write_safetensors(tensors, folder / "sae_weights.safetensors")
        write_json(
            folder / "cfg.json",
            {
                "d_in": parts.d_in,
                "d_sae": n,
                "dtype": "float32",
                "device": "cpu",
                "apply_b_dec_to_input": parts.subtracts,
                "normalize_activations": norms[parts.normaliser],
                "reshape_activations": "none",
                "metadata": metadata,
                **({"d_out": parts.d_out} if transcodes else {}),
                **config,
            },
        )
        return folder

    @staticmethod
    def _file(candidate: Candidate) -> str | None:
        safe = [each for each in candidate.weights if each.endswith(".safetensors")]
        return next((each for each in safe if {"W_dec", "b_dec"} <= candidate.keys(each)), None)


def _modern(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Turn a flat configuration from before version 6 into a current one."""
    modern = {_RENAMED.get(key, key): value for key, value in config.items()}
    if modern.get("activation_fn") == "topk":
        kwargs = modern.get("activation_fn_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise SparsightError(
                f"{where}: activation_fn_kwargs is {shown(kwargs)}; expected an object."
            )
        k = kwargs.get("k")
        modern |= {"architecture": "topk", "k": k}
    modern["architecture"] = modern.get("architecture") or "standard"
    kind = modern.get("normalize_activations")
    if isinstance(kind, bool):
        modern["normalize_activations"] = "expected_average_only_in" if kind else "none"
    whole_number(modern, "d_in", where)
    whole_number(modern, "d_sae", where)
    kinds: dict[str, tuple[type, str]] = {
        "metadata": (dict, "an object"),
        "normalize_activations": (str, "a text"),
        "architecture": (str, "a text"),
    }
    for key, (kind, expected) in kinds.items():
        if not isinstance(modern.get(key) or kind(), kind):
            raise SparsightError(f"{where}: {key} is {shown(modern[key])}; expected {expected}.")
    return modern


def _scaling(
    candidate: Candidate, d_in: int, settings: dict[str, Any], notes: list[str]
) -> dict[str, Tensor]:
    """Return the scale, which a training checkpoint keeps beside its weights, an export in them."""
    factor = candidate.config("activation_scaler.json").get("scaling_factor")
    if isinstance(factor, int | float) and factor > 0:
        settings["normaliser"] = "scale"
        return {
            "normaliser.mean": torch.zeros(d_in),
            "normaliser.scale": torch.tensor([1 / factor], dtype=torch.float32),
        }
    notes.append(
        "normalize_activations is expected_average_only_in and no activation_scaler.json says by "
        "what: taken as folded into the weights"
    )
    return {}


def _rescaled(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norms = W_dec.norm(dim=-1)
    return W_enc * norms, b_enc * norms, W_dec / norms.clamp(min=1e-30)[:, None]


def _pursuit(config: dict[str, Any], where: str) -> MatchingPursuit:
    steps = config["d_in"]
    if config.get("max_iterations"):
        steps = whole_number(config, "max_iterations", where)
    tolerance = config.get("residual_threshold", 0.01)
    if not isinstance(tolerance, int | float):
        raise SparsightError(
            f"{where}: residual_threshold is {shown(tolerance)}; expected a number."
        )
    return MatchingPursuit(
        min(steps, config["d_sae"]),
        tolerance=max(0.0, float(tolerance)),
        stop_on_repeat=bool(config.get("stop_on_duplicate_support", True)),
    )


def _about(about: dict[str, Any]) -> dict[str, Any]:
    belongs: dict[str, Any] = {}
    if isinstance(about.get("model_name"), str):
        belongs["model"] = {"id": about["model_name"]}
    site = site_of_hook(about.get("hook_name"))
    if site:
        belongs["site"] = site
    elif isinstance(about.get("hook_name"), str):
        belongs["hook_name"] = about["hook_name"]
    return belongs


def _parts(parts: Plain) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields and tensors that depend on the architecture."""
    sparsity = parts.sparsity
    tensors = {
        "W_enc": parts.W_enc.T.contiguous(),
        "b_enc": parts.b_enc,
        "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }
    ending = ""
    if parts.d_out is not None:
        ending = "skip_transcoder" if parts.W_skip is not None else "transcoder"
        if parts.W_skip is not None:
            tensors["W_skip"] = parts.W_skip
    if isinstance(sparsity, TopK | AbsTopK):
        name = "abstopk" if isinstance(sparsity, AbsTopK) else "topk"
        return {
            "architecture": name,
            "k": sparsity.k,
            "rescale_acts_by_decoder_norm": False,
        }, tensors
    if isinstance(sparsity, JumpReLU | BatchTopK) and parts.threshold is not None:
        threshold = parts.threshold
        if isinstance(sparsity, BatchTopK):
            threshold = above(threshold).expand(len(parts.W_enc)).contiguous()
        tensors["threshold"] = threshold
        return {"architecture": f"jumprelu_{ending}" if ending else "jumprelu"}, tensors
    if isinstance(sparsity, Gated) and parts.r_mag is not None and parts.b_mag is not None:
        tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": parts.r_mag, "b_mag": parts.b_mag}
        return {"architecture": "gated"}, tensors
    if isinstance(sparsity, MatchingPursuit):
        return {
            "architecture": "matching_pursuit",
            "apply_b_dec_to_input": True,
            "residual_threshold": sparsity.tolerance,
            "max_iterations": sparsity.k,
            "stop_on_duplicate_support": sparsity.stop_on_repeat,
        }, {"W_dec": parts.W_dec, "b_dec": parts.b_dec}
    return {"architecture": ending or "standard"}, tensors
