"""ViT-Prisma: `config.json` and a file of tensors, or one pickle that holds both.

The encoder reads z − b_dec and applies ReLU, or TopK and then ReLU. Optional are run-time
normalisation of each vector, a gate, and another site as the target. Pickled configurations are
read as plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import write_json
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, need
from sparsight.formats.sites import belongs, hook_of_site, site_of_hook
from sparsight.formats.writing import plain, write_torch
from sparsight.pickles import shown, text_of
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import NormaliserKind, SAEConfig
from sparsight.sae.sparsity import AnySparsity, Gated, ReLU, TopK

WEIGHTS = "weights.pt"
CONFIG = "config.json"

_MATRICES = {"W_enc", "W_dec"}
_MARK = "layer_subtype"
"""A configuration with this key is Prisma's."""

_NORMALISERS: dict[str | None, NormaliserKind] = {
    None: "none",
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
_USED = {"b_enc", "W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag", "b_dec_out", "W_skip"}
_KNOWN = {
    *("__class__", "model_class_name", "model_name", "vit_model_cfg", "model_path", "hook_point"),
    *("hook_point_layer", "layer_subtype", "hook_point_head_index", "context_size"),
    *("use_patches_only", "cls_token_only", "image_size", "num_patch", "d_in", "d_sae", "d_out"),
    *("expansion_factor", "architecture", "activation_fn_str", "activation_fn_kwargs"),
    *("normalize_activations", "is_transcoder", "transcoder_with_skip_connection"),
    *("out_hook_point_layer", "layer_out_subtype", "device", "dtype", "_device", "_dtype"),
    *("_custom_hook_point", "seed"),
    # About training and images; the last lines are from the files in the style of SAELens 2.
    *("is_training", "verbose", "initialization_method", "b_dec_init_method"),
    *("from_pretrained_path", "use_cached_activations", "cached_activations_path"),
    *("n_batches_in_buffer", "store_batch_size", "num_workers", "num_epochs"),
    *("total_training_images", "total_training_tokens", "total_training_steps"),
    *("tokens_per_buffer", "train_batch_size", "l1_coefficient", "lp_norm", "lr"),
    *("lr_scheduler_name", "lr_warm_up_steps", "max_grad_norm", "min_l0"),
    *("min_explained_variance", "dataset_name", "dataset_path", "dataset_train_path"),
    *("dataset_val_path", "use_ghost_grads", "feature_sampling_window", "dead_feature_window"),
    *("dead_feature_threshold", "log_to_wandb", "wandb_project", "wandb_entity"),
    *("wandb_log_frequency", "n_validation_runs", "n_checkpoints", "checkpoint_path"),
    *("is_dataset_tokenized", "prepend_bos", "run_name", "resume", "adam_beta1", "adam_beta2"),
    *("l1_warm_up_steps", "lr_end", "lr_decay_steps", "n_restart_cycles"),
    *("mse_loss_normalization", "normalize_sae_decoder", "noise_factor"),
    *("feature_sampling_method", "resample_batches", "feature_reinit_scale"),
    *("dead_feature_estimation_method", "eval_every_n_wandb_logs", "n_eval_batches"),
    *("n_eval_seqs", "training_tokens", "finetuning_tokens"),
}
"""Keys of its configurations. `apply_b_dec_to_input` is not among them: it would matter."""


class Prisma(Format):
    """SAEs and transcoders of ViT-Prisma, and its files in the style of SAELens 2."""

    name = "prisma"
    title = "ViT-Prisma"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether there are encoder, decoder, and a configuration with Prisma's keys."""
        return self._find(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the files.

        Raises:
            UserError: Sparsight has no such activation or architecture.
            SparsightError: the file is damaged.
        """
        parts = self._find(candidate)
        assert parts is not None
        file, config, state = parts
        path = candidate.folder / file
        tensors = named_tensors(state)
        W_enc, W_dec, b_dec = need(tensors, ("W_enc", "W_dec", "b_dec"), path)
        if W_enc.ndim != 2 or W_dec.ndim != 2:
            raise SparsightError(f"{path}: W_enc or W_dec is not a matrix.")
        d_in, n = W_enc.shape
        if config.get("d_in", d_in) != d_in:
            raise SparsightError(
                f"{path}: W_enc reads {d_in} numbers; d_in is {shown(config['d_in'])}."
            )
        sparsity, cap = _sparsity(config, path)
        gated = isinstance(sparsity, Gated)
        if gated:
            gate, r_mag, b_mag = need(tensors, ("b_gate", "r_mag", "b_mag"), path)
            ours = {"W_enc": W_enc.T, "b_enc": gate, "r_mag": r_mag, "b_mag": b_mag}
        else:
            ours = {"W_enc": W_enc.T, "b_enc": need(tensors, ("b_enc",), path)[0]}
        ours |= {"W_dec": W_dec, "b_dec": b_dec}
        normaliser, notes = _normaliser(config, path)
        transcoder = "b_dec_out" in tensors or config.get("is_transcoder") is True
        if transcoder:
            ours |= _transcoder(tensors, normaliser, path)
        return Foreign(
            format=self.name,
            d_in=d_in,
            d_out=W_dec.shape[1] if transcoder else None,
            config=SAEConfig(
                n_latents=n,
                sparsity=sparsity,
                normaliser=normaliser,
                unit_norm_decoder=False,
                subtract_b_dec=not transcoder,
                skip="W_skip" in ours,
                soft_cap=cap,
            ),
            tensors=ours,
            metadata={**_belongs(config), "source": candidate.source(self.name, file)},
            unknown=tuple(sorted({*config} - _KNOWN)) + tuple(sorted({*tensors} - _USED)),
            notes=tuple(notes),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `config.json` and `weights.pt`.

        "layer_norm" and "constant_norm" are kept; other normalisers are folded in.

        Raises:
            UserError: the sparsity is not ReLU, TopK or Gated, or the number of latents is not a
                multiple of the width.
        """
        kinds: dict[str, str] = {kind: name for name, kind in _NORMALISERS.items() if name}
        parts = plain(sae, self.title, per_vector=("layer_norm", "constant_norm"))
        parts.only(ReLU, TopK, Gated, title=self.title)
        sparsity, transcoder = parts.sparsity, parts.d_out is not None
        expansion, rest = divmod(len(parts.W_enc), parts.d_in)
        if rest:
            raise UserError(
                f"ViT-Prisma's latents are a multiple of the width; {len(parts.W_enc)} is none of "
                f"{parts.d_in}."
            )
        b_enc, b_mag = parts.biases(subtracts=not transcoder)
        state = {"W_dec": parts.W_dec, "W_enc": parts.W_enc.T.contiguous(), "b_enc": b_enc}
        state["b_dec"] = parts.b_dec
        if b_mag is not None and parts.r_mag is not None:
            extra = {"r_mag": parts.r_mag, "b_mag": b_mag}
            state |= {"b_gate": b_enc, "b_enc": torch.zeros_like(b_enc), **extra}
        if transcoder:
            if isinstance(sparsity, Gated):
                raise UserError("ViT-Prisma has no gated transcoders.")
            if parts.W_skip is not None and parts.normaliser != "none":
                raise UserError(
                    f"ViT-Prisma's skip connections read the input before {parts.normaliser!r}, "
                    "but Sparsight's read it afterwards."
                )
            state |= {"b_dec_out": parts.b_dec, "b_dec": torch.zeros(parts.d_in)}
            if parts.W_skip is not None:
                if parts.d_out != parts.d_in:
                    raise UserError("ViT-Prisma's skip connections keep the width.")
                state["W_skip"] = parts.W_skip
        config = {
            **_place(sae.metadata),
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "expansion_factor": expansion,
            "architecture": "gated" if isinstance(sparsity, Gated) else "standard",
            "activation_fn_str": "topk" if isinstance(sparsity, TopK) else "relu",
            "activation_fn_kwargs": {"k": sparsity.k} if isinstance(sparsity, TopK) else {},
            "normalize_activations": kinds[parts.normaliser],
            "is_transcoder": transcoder,
            "transcoder_with_skip_connection": parts.W_skip is not None,
            "initialization_method": "independent",
            "use_ghost_grads": False,
            "_dtype": "torch.float32",
            "_device": "cpu",
        }
        write_torch(state, folder / WEIGHTS)
        write_json(folder / CONFIG, config)
        return folder

    @staticmethod
    def _find(candidate: Candidate) -> tuple[str, dict[str, Any], Mapping[str, Any]] | None:
        """Return file, configuration and state."""
        beside = candidate.config(CONFIG)
        for file in candidate.weights:
            keys = candidate.keys(file)
            if {"cfg", "state_dict"} <= keys or {"config", "autoencoder"} <= keys:
                payload = candidate.payload(file)
                own = payload.get("cfg", payload.get("config"))
                state = payload.get("state_dict", payload.get("autoencoder"))
                if isinstance(state, Mapping) and "state_dict" in state:
                    state = state["state_dict"]
                config = _plain(own) or beside
                if "autoencoder" in keys:
                    config = _of_saelens_2(config)
            elif keys >= _MATRICES:
                config, state = beside, candidate.payload(file)
            else:
                continue
            if not isinstance(state, Mapping) or not set(state) >= _MATRICES:
                continue
            if _MARK in config or "vit_prisma" in text_of(config.get("__class__")):
                return file, config, state
        return None


def _plain(config: Any) -> dict[str, Any]:
    return {str(key): each for key, each in config.items()} if isinstance(config, Mapping) else {}


def _of_saelens_2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of Prisma's first files, which have no run-time normalisation."""
    if not {"hook_point", "d_in"} <= set(config):
        return {}
    layer, _, subtype = text_of(config["hook_point"]).removeprefix("blocks.").partition(".")
    place = {"hook_point_layer": int(layer), "layer_subtype": subtype} if layer.isdigit() else {}
    return {
        "activation_fn_str": "relu",
        "normalize_activations": "none",
        **{key: each for key, each in config.items() if key != "hook_point_layer"},
        **place,
    }


def _sparsity(config: Mapping[str, Any], path: Path) -> tuple[AnySparsity, float | None]:
    """Return the sparsity, and a soft cap if there is one."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn_str", "relu")
    kwargs = _plain(config.get("activation_fn_kwargs"))
    if config.get("hook_point_head_index") is not None:
        raise UserError(
            f"{path}: it reads one attention head (hook_point_head_index is "
            f"{shown(config['hook_point_head_index'])}), which Sparsight has no site for."
        )
    if architecture == "gated" and activation == "relu":
        return Gated(), None
    if architecture == "standard":
        if activation == "relu":
            return ReLU(), None
        if activation == "tanh-relu":
            return ReLU(), 1.0
        if activation == "topk" and set(kwargs) <= {"k", "postact_fn"}:
            after = kwargs.get("postact_fn")
            if after is not None and "ReLU" not in text_of(_plain(after).get("__class__", after)):
                raise UserError(f"{path}: what follows its TopK is {shown(after)}, not a ReLU.")
            k = kwargs.get("k")
            if type(k) is not int or k < 1:
                raise SparsightError(
                    f"{path}: activation_fn_kwargs gives its TopK the k {shown(k)}; expected a "
                    "number of 1 or more."
                )
            return TopK(k=k), None
    raise UserError(
        f"{path}: architecture {shown(architecture)} with activation_fn_str {shown(activation)} is "
        "not supported; Sparsight reads standard with relu, topk or tanh-relu, and gated with relu."
    )


def _normaliser(config: Mapping[str, Any], path: Path) -> tuple[NormaliserKind, list[str]]:
    if "normalize_activations" not in config:
        return "layer_norm", [
            "its configuration does not say how activations are normalised; taken to be by "
            "layer_norm, as ViT-Prisma does by default"
        ]
    kind = config["normalize_activations"]
    if not isinstance(kind, str | None) or kind not in _NORMALISERS:
        raise UserError(f"{path}: normalize_activations is {shown(kind)}, which is unknown.")
    return _NORMALISERS[kind], []


def _transcoder(
    tensors: Mapping[str, Tensor], normaliser: NormaliserKind, path: Path
) -> dict[str, Tensor]:
    """Return the tensors of a transcoder; its subtracted bias becomes part of `b_enc`."""
    if normaliser != "none" and "W_skip" in tensors:
        raise UserError(
            f"{path}: its skip connection reads the input before {normaliser!r} and is added after "
            "the output is scaled back, which Sparsight does not support."
        )
    W_enc, b_enc, b_dec, b_out = need(tensors, ("W_enc", "b_enc", "b_dec", "b_dec_out"), path)
    if b_dec.shape != W_enc.shape[:1] or b_enc.shape != W_enc.shape[1:]:
        raise SparsightError(f"{path}: b_dec or b_enc does not fit W_enc.")
    folded = b_enc.double() - b_dec.double() @ W_enc.double()
    ours = {"b_enc": folded.float(), "b_dec": b_out}
    if "W_skip" in tensors:
        ours["W_skip"] = tensors["W_skip"]
    return ours


def _belongs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return model, site and tokens."""
    layer, subtype = config.get("hook_point_layer"), config.get("layer_subtype")
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    tokens = "all"
    if config.get("cls_token_only") is True:
        tokens = "cls"
    elif config.get("use_patches_only") is True:
        tokens = "patches"
    name = config.get("model_name")
    target = None
    if config.get("is_transcoder") is True:
        out = (config.get("out_hook_point_layer"), config.get("layer_out_subtype"))
        target = site_of_hook(f"blocks.{out[0]}.{out[1]}")
    return belongs(
        model=_our_id(name) if isinstance(name, str) else None,
        site=site_of_hook(f"blocks.{layer}.{subtype}"),
        target=target,
        tokens=tokens,
    )


def _our_id(name: str) -> str:
    """Turn `open-clip:laion/CLIP-…` into `open_clip:hf-hub:laion/CLIP-…`."""
    if not name.startswith("open-clip:"):
        return name
    own = name.removeprefix("open-clip:")
    return f"open_clip:hf-hub:{own}" if "/" in own else f"open_clip:{own}"


def _their_name(id: str) -> str:
    return id.replace("open_clip:hf-hub:", "open-clip:").replace("open_clip:", "open-clip:")


def _place(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return Prisma's names for where an SAE belongs, as far as that is known."""
    place: dict[str, Any] = {"hook_point_layer": None, "layer_subtype": None}
    model = (metadata.get("model") or {}).get("id")
    if isinstance(model, str):
        place["model_name"] = _their_name(model)
    hook = hook_of_site(metadata.get("site"))
    if hook is not None:
        _, layer, subtype = hook.split(".")
        place |= {"hook_point_layer": int(layer), "layer_subtype": subtype}
    place["cls_token_only"] = metadata.get("tokens") == "cls"
    place["use_patches_only"] = metadata.get("tokens") == "patches"
    return place
