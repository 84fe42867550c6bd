"""OpenMOSS Llamascopium (Language-Model-SAEs): `config.json` and `sae_weights.safetensors`.

h = x̃ W_E + b_E with x̃ = x √d / (mean norm of the data set). If `sparsity_include_decoder_norm` is
set, a latent is weighted by the norm of its decoder row: f = act(h ‖W_D‖) / ‖W_D‖. The output is
f W_D + b_D, converted back to the target's units. Thresholds are stored as logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, need, weights
from sparsight.formats.sites import belongs, site_of_hook
from sparsight.pickles import shown, text_of
from sparsight.sae.config import NormaliserKind, SAEConfig
from sparsight.sae.sparsity import AnySparsity, JumpReLU, ReLU, TopK

CONFIG = "config.json"

_NAMES = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight"}
"""Today's names, and those of the first files, whose matrices are transposed."""

_NORM = "dataset_average_activation_norm."
_LOG_THRESHOLDS = (
    "activation_function.log_jumprelu_threshold",
    "log_jumprelu_threshold",
)
_MARKS = {"hook_point_in", "hook_point_out", "norm_activation", "sparsity_include_decoder_norm"}
_KNOWN = {
    *("sae_type", "model_name", "hook_point_in", "hook_point_out", "d_model", "d_sae"),
    *("expansion_factor", "use_decoder_bias", "use_glu_encoder", "act_fn", "jump_relu_threshold"),
    *("apply_decoder_bias_to_pre_encoder", "norm_activation", "dataset_average_activation_norm"),
    *("sparsity_include_decoder_norm", "top_k", "device", "dtype", "seed"),
    *("sae_pretrained_name_or_path", "sae_from_pretrained_path", "strict_loading"),
    # About kernels and training.
    *("use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel"),
    *("sparsity_threshold_for_csr", "circuit_tracing_mode", "promote_act_fn_dtype"),
    *("jumprelu_threshold_window", "jumprelu_threshold_grad_scale", "force_unit_decoder_norm"),
    *("decoder_exactly_unit_norm", "decoder_bias_init_method", "bias_init_method"),
    *("geometric_median_max_iter", "init_decoder_norm", "init_encoder_norm"),
    *("init_encoder_with_decoder_transpose", "remove_gradient_parallel_to_decoder_directions"),
    *("use_ghost_grads", "use_batch_norm_mse", "use_auxk", "k_aux", "dead_threshold"),
    *("aux_coefficient", "l1_coefficient", "l1_coefficient_warmup_steps", "lp", "initial_k"),
    *("k_warmup_steps",),
}
_FILES = ("checkpoints/pruned.safetensors", "checkpoints/final.safetensors")


class Llamascopium(Format):
    """SAEs and transcoders of OpenMOSS."""

    name = "llamascopium"
    title = "OpenMOSS Llamascopium"

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether there are a configuration with two hook points, and an encoder."""
        return self._file(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the files.

        Raises:
            UserError: it is another kind of dictionary, or has a part that Sparsight does not
                support.
            SparsightError: a file is damaged.
        """
        file = self._file(candidate)
        assert file is not None
        path, config = candidate.folder / file, candidate.config(CONFIG)
        tensors = _state(candidate, file)
        _check_kind(config, tensors, path)
        old = "encoder.weight" in tensors
        W_enc, b_enc, W_dec = need(tensors, [_NAMES[k] if old else k for k in _NAMES], path)
        if W_enc.ndim != 2 or W_dec.ndim != 2:
            raise SparsightError(f"{path}: the encoder or the decoder is not a matrix.")
        if not old:
            W_enc = W_enc.T
        else:
            W_dec = W_dec.T
        (n, d_in), d_out = W_enc.shape, W_dec.shape[1]
        if len(W_dec) != n or b_enc.shape != (n,):
            raise SparsightError(f"{path}: encoder, decoder and bias have different sizes.")
        if config.get("d_model", d_in) != d_in or config.get("d_model", d_out) != d_out:
            raise SparsightError(
                f"{path}: reads {d_in} numbers and gives {d_out}; d_model is "
                f"{shown(config['d_model'])}."
            )
        bias = "decoder.bias" if old else "b_D"
        if bias in tensors:
            b_dec = weights(tensors[bias], bias, path)
        elif config.get("use_decoder_bias", True):
            raise SparsightError(f"{path}: the decoder's bias is missing.")
        else:
            b_dec = W_dec.new_zeros(d_out)
        normaliser, scale, out_scale = _normaliser(config, tensors, (d_in, d_out), path)
        sparsity, notes = _sparsity(config, n, path)
        weigh = config.get("sparsity_include_decoder_norm") is True
        norms = W_dec.double().norm(dim=1)
        ours: dict[str, Tensor] = {}
        if isinstance(sparsity, JumpReLU):
            threshold = _thresholds(config, tensors, n, path)
            ours["threshold"] = (threshold / norms if weigh else threshold).float()
        elif isinstance(sparsity, TopK) and weigh:
            if bool((norms == 0).any()):
                raise SparsightError(f"{path}: decoder rows of norm 0 cannot be ranked by norm.")
            W_enc, b_enc = W_enc * norms[:, None], b_enc * norms
            W_dec = W_dec / norms[:, None]
            notes.append("codes are those of the file times the norms of its decoder rows")
        transcoder = config.get("hook_point_in") != config.get("hook_point_out")
        if transcoder:
            W_dec, b_dec = W_dec * out_scale, b_dec * out_scale
        elif normaliser == "scale" and out_scale != scale:
            raise SparsightError(f"{path}: one hook point has two average norms.")
        ours |= {"W_enc": W_enc.float(), "b_enc": b_enc.float()}
        ours |= {"W_dec": W_dec.float(), "b_dec": b_dec.float()}
        if transcoder and normaliser == "scale":
            ours["W_enc"], normaliser = ours["W_enc"] / scale, "none"
        if normaliser == "scale":
            ours["normaliser.mean"] = W_enc.new_zeros(d_in).float()
            ours["normaliser.scale"] = W_enc.new_tensor([scale]).float()
        used = {*_NAMES, *_NAMES.values(), "b_D", "decoder.bias", *_LOG_THRESHOLDS}
        strange = [key for key in tensors if key not in used and not key.startswith(_NORM)]
        return Foreign(
            format=self.name,
            d_in=d_in,
            d_out=d_out if transcoder else None,
            config=SAEConfig(
                n_latents=n,
                sparsity=sparsity,
                normaliser=normaliser,
                unit_norm_decoder=False,
                subtract_b_dec=config.get("apply_decoder_bias_to_pre_encoder") is True,
            ),
            tensors=ours,
            metadata={
                **belongs(
                    model=_text(config.get("model_name")),
                    site=site_of_hook(config.get("hook_point_in")),
                    target=site_of_hook(config.get("hook_point_out")) if transcoder else None,
                ),
                "source": candidate.source(self.name, file),
            },
            unknown=tuple(sorted({*config} - _KNOWN)) + tuple(sorted(strange)),
            notes=tuple(notes),
        )

    @staticmethod
    def _file(candidate: Candidate) -> str | None:
        if len(_MARKS & set(candidate.config(CONFIG))) < 2:
            return None
        others = () if candidate.chosen else tuple(file for file in _FILES if candidate.has(file))
        for file in (*candidate.weights, *others):
            keys = candidate.keys(file)
            if "sae" in keys or {"W_E", "W_D"} <= keys or {"encoder.weight", "b_D"} <= keys:
                return file
            if {"encoder.weight", "decoder.weight"} <= keys:
                return file
        return None


def _state(candidate: Candidate, file: str) -> dict[str, Tensor]:
    payload = candidate.payload(file)
    return named_tensors(payload.get("sae", payload) if isinstance(payload, Mapping) else {})


def _check_kind(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    kind = config.get("sae_type", "sae")
    if kind not in ("sae", "transcoder"):
        raise UserError(
            f"{path}: holds a {text_of(kind)[:60] or shown(kind)} (sae_type); Sparsight reads SAEs "
            "and transcoders."
        )
    if config.get("use_glu_encoder") is True or "W_E_glu" in tensors:
        raise UserError(
            f"{path}: its encoder is gated by a second one (GLU), which is not supported."
        )


def _normaliser(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], widths: tuple[int, int], path: Path
) -> tuple[NormaliserKind, float, float]:
    """Return the kind, and the divisors of activations and targets."""
    kind = config.get("norm_activation", "inference")
    if kind in ("inference", "none", None):
        return "none", 1.0, 1.0
    if kind == "token-wise" and config.get("hook_point_in") == config.get("hook_point_out"):
        return "constant_norm", 1.0, 1.0
    if kind != "dataset-wise":
        raise UserError(
            f"{path}: norm_activation is {shown(kind)}, which depends on more than the vector "
            "itself; only inference, dataset-wise and (for SAEs) token-wise are supported."
        )
    norms: list[float] = []
    for short, hook in (("in", "hook_point_in"), ("out", "hook_point_out")):
        norm = tensors.get(f"{_NORM}{config.get(hook)}", tensors.get(f"{_NORM}{short}"))
        if norm is None or norm.numel() != 1 or not float(norm) > 0:
            raise SparsightError(
                f"{path}: {hook} is {shown(config.get(hook))}, whose activations are scaled by "
                f"their average norm, and {_NORM}{text_of(config.get(hook))} is "
                f"{'missing' if norm is None else shown(norm)}."
            )
        norms.append(float(norm) / widths[len(norms)] ** 0.5)
    return "scale", norms[0], norms[1]


def _sparsity(config: Mapping[str, Any], n: int, path: Path) -> tuple[AnySparsity, list[str]]:
    name = config.get("act_fn", "relu")
    if name == "relu":
        return ReLU(), []
    if name == "jumprelu":
        return JumpReLU(), []
    if name == "topk":
        k = config.get("top_k")
        if type(k) is not int or not 1 <= k <= n:
            raise SparsightError(f"{path}: top_k is {shown(k)}, of {n} latents.")
        return TopK(k=k), []
    raise UserError(
        f"{path}: act_fn is {shown(name)}, which looks at the whole batch and has no threshold. "
        "Convert it to jumprelu with Llamascopium first."
        if name == "batchtopk"
        else f"{path}: act_fn is {shown(name)}; relu, jumprelu and topk are read."
    )


def _thresholds(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], n: int, path: Path
) -> Tensor:
    """Return one threshold per latent; the first files have one for all latents."""
    key = next((key for key in _LOG_THRESHOLDS if key in tensors), None)
    if key is not None:
        return weights(tensors[key], key, path).double().exp().expand(n)
    number = config.get("jump_relu_threshold")
    if isinstance(number, float | int) and number >= 0:
        return torch.full((n,), float(number), dtype=torch.float64)
    raise SparsightError(
        f"{path}: its jumprelu has no thresholds ({', '.join(_LOG_THRESHOLDS)}), and "
        f"jump_relu_threshold is {shown(number)}."
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
