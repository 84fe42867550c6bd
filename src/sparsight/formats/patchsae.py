"""Hugo Fry's SAEs for ViTs, and PatchSAE, which builds on them: a pickle with `state_dict`.

ReLU((x − b_dec) W_enc + b_enc) W_dec + b_dec. The configuration is an object of the project's own
class, or a dictionary; both are read as plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, need
from sparsight.formats.sites import belongs
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import ReLU

_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_CONFIGS = ("cfg", "config")
_MARKS = {"block_layer", "module_name"}
_KNOWN = {
    *("__class__", "class_token", "image_width", "image_height", "model_name", "module_name"),
    *("block_layer", "d_in", "d_sae", "expansion_factor", "gated_sae", "architecture", "device"),
    *("dtype", "seed", "custom_clip_ckpt_path"),
    # About training and images.
    *("dataset_path", "image_key", "label_key", "use_cached_activations"),
    *("cached_activations_path", "total_training_tokens", "n_batches_in_store", "store_size"),
    *("max_batch_size_for_vit_forward_pass", "create_dataloader", "b_dec_init_method"),
    *("from_pretrained_path", "l1_coefficient", "mse_cls_coefficient", "lr", "lr_scheduler_name"),
    *("lr_warm_up_steps", "batch_size", "use_ghost_grads", "feature_sampling_window"),
    *("feature_sampling_method", "resample_batches", "feature_reinit_scale"),
    *("dead_feature_window", "dead_feature_estimation_method", "dead_feature_threshold"),
    *("log_to_wandb", "wandb_project", "wandb_entity", "wandb_log_frequency", "n_checkpoints"),
    *("checkpoint_path", "run_name"),
}
_DEPTHS = {
    "openai/clip-vit-base-patch16": 12,
    "openai/clip-vit-base-patch32": 12,
    "openai/clip-vit-large-patch14": 24,
    "openai/clip-vit-large-patch14-336": 24,
}
"""Number of blocks of the models that were used: these projects count layers from the end."""


class PatchSAE(Format):
    """The SAEs of mats_sae_training_for_ViTs (Fry) and PatchSAE (Lim et al.)."""

    name = "patchsae"
    title = "PatchSAE and Fry's SAEs for ViTs"

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether a state stands beside a configuration that names a block and a module."""
        return self._find(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the file.

        Raises:
            UserError: its architecture is not the only one that the project finished.
            SparsightError: the file is damaged.
        """
        parts = self._find(candidate)
        assert parts is not None
        file, config, state = parts
        path = candidate.folder / file
        tensors = named_tensors(state)
        W_enc, b_enc, W_dec, b_dec = need(tensors, _TENSORS, path)
        if config.get("gated_sae") is True or config.get("architecture") == "gated":
            raise UserError(f"{path}: gated SAEs were never finished in this project.")
        if W_enc.ndim != 2:
            raise SparsightError(f"{path}: W_enc is not a matrix.")
        return Foreign(
            format=self.name,
            d_in=W_enc.shape[0],
            config=SAEConfig(
                n_latents=W_enc.shape[1],
                sparsity=ReLU(),
                normaliser="none",
                unit_norm_decoder=False,
            ),
            tensors={"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec},
            metadata={**_belongs(config), "source": candidate.source(self.name, file)},
            unknown=tuple(sorted({*map(str, config)} - _KNOWN))
            + tuple(sorted({*tensors} - {*_TENSORS})),
        )

    @staticmethod
    def _find(candidate: Candidate) -> tuple[str, Mapping[str, Any], Mapping[str, Any]] | None:
        for file in candidate.weights:
            keys = candidate.keys(file)
            name = next((each for each in _CONFIGS if each in keys), None)
            if name is None or "state_dict" not in keys:
                continue
            payload = candidate.payload(file)
            config, state = payload[name], payload["state_dict"]
            if not isinstance(config, Mapping) or not isinstance(state, Mapping):
                continue
            if set(config) >= _MARKS and set(state) >= set(_TENSORS):
                return file, config, state
        return None


def _belongs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return model, site and tokens."""
    model, layer, module = (config.get(key) for key in ("model_name", "block_layer", "module_name"))
    site = None
    if type(layer) is int and module == "resid":
        depth = _DEPTHS.get(model, 0) if isinstance(model, str) else 0
        site = f"blocks.{layer + depth if layer < 0 else layer}.resid_post"
    cls = config.get("class_token")
    return belongs(
        model=model if isinstance(model, str) else None,
        site=site,
        tokens=None if cls is None else "cls" if cls is True else "all",
    )
