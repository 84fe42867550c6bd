"""Checkpoints of other projects as they write them, each with its own function of x beside it.

The functions are the projects' formulas, in the names and orientations of their files.
"""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exchange import peers

D, N, K = 6, 18, 4

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x → codes [batch, n], output [batch, d]."""

Write = Callable[[Path], tuple[Path, Function]]
"""Writes into a folder; gives what a user would name, and the function."""

CASES: dict[str, Write] = {}


def case(write: Write) -> Write:
    CASES[write.__name__.strip("_")] = write
    return write


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape)))


def parts(d_out: int = D) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc [d, n], b_enc, W_dec [n, d_out], b_dec: as after training, rows of unlike norms."""
    W_enc = numbers(D, N) / D**0.5
    W_dec = W_enc.T[:, :1] * 0 + numbers(N, d_out, seed=1) * torch.linspace(0.4, 2, N)[:, None]
    return W_enc, numbers(N, seed=2) / 4, W_dec, numbers(d_out, seed=3)


def topk(pre: Tensor, k: int = K) -> Tensor:
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mu = x.mean(-1, keepdim=True)
    std = x.std(-1, keepdim=True)
    return (x - mu) / (std + 1e-5), mu, std


@contextmanager
def known_as(name: str) -> Iterator[type]:
    """A class that pickles under a name of another package, which is not installed."""
    module, _, cls = name.rpartition(".")
    made = type(cls, (), {"__module__": module})
    added = [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)]
    for each in added:
        sys.modules[each] = types.ModuleType(each)
    setattr(sys.modules[module], cls, made)
    try:
        yield made
    finally:
        for each in added:
            del sys.modules[each]


def save_with(path: Path, name: str, config: dict[str, Any], **rest: Any) -> None:
    """`torch.save` with a configuration that is an object of the class `name`, under "cfg"."""
    with known_as(name) as cls:
        made = cls()
        made.__dict__.update(config)
        torch.save({"cfg": made, **rest}, path)


# saev


def saev_file(path: Path, header: dict[str, Any], **extra: Tensor) -> Path:
    W_enc, b_enc, W_dec, b_dec = parts()
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **extra}, file)
    return path


def saev_function(act: Callable[[Tensor], Tensor], subtract: bool) -> Function:
    W_enc, b_enc, W_dec, b_dec = parts()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = act((x - b_dec if subtract else x) @ W_enc + b_enc)
        return f, f @ W_dec + b_dec

    return function


def saev_activation(cls: str, **params: Any) -> dict[str, Any]:
    none = {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}
    return {"cls": cls, "params": {"key": cls.lower(), "sparsity": none, **params}}


@case
def saev_without_schema(folder: Path) -> tuple[Path, Function]:
    header = {"d_vit": D, "exp_factor": N // D, "sparsity_coeff": 4e-4, "n_reinit_samples": 1}
    header |= {"ghost_grads": False, "remove_parallel_grads": True, "normalize_w_dec": True}
    return saev_file(folder / "sae.pt", {**header, "seed": 0}), saev_function(torch.relu, True)


@case
def saev_schema_1_of_a_class(folder: Path) -> tuple[Path, Function]:
    cfg = {"d_vit": D, "exp_factor": N // D, "top_k": K, "seed": 0}
    header = {"schema": 1, "cls": "TopK", "cfg": cfg, "commit": "abc", "lib": "0.1.0"}
    return saev_file(folder / "sae.pt", header), saev_function(topk, True)


@case
def saev_schema_1_of_an_activation(folder: Path) -> tuple[Path, Function]:
    cfg = {"d_vit": D, "exp_factor": N // D, "seed": 0, "activation": {}}
    header = {"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": cfg}
    return saev_file(folder / "sae.pt", header), saev_function(torch.relu, False)


@case
def saev_schema_5(folder: Path) -> tuple[Path, Function]:
    cfg = {"d_model": D, "d_sae": N, "activation": saev_activation("TopK", top_k=K)}
    cfg |= {"reinit_blend": 0.8, "reinit_enc_dec_tranpose": True}
    header = {"schema": 5, "cfg": cfg, "commit": "abc", "lib": "0.1.0"}
    training = {"train_data": {"layer": 10, "tokens": "content"}}
    (folder / "config.json").write_text(json.dumps(training))
    saev_file(folder / "sae.pt", header)
    return folder, saev_function(topk, False)


@case
def saev_batch_topk(folder: Path) -> tuple[Path, Function]:
    cfg = {"d_model": D, "d_sae": N, "activation": saev_activation("BatchTopK", top_k=K)}
    path = folder / "sae.pt"
    saev_file(path, {"schema": 4, "cfg": cfg}, **{"activation.threshold": torch.tensor(0.7)})
    return path, saev_function(lambda pre: pre * (pre > 0.7), False)


# ViT-Prisma

PRISMA = {
    "model_class_name": "HookedViT",
    "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "hook_point_layer": 10,
    "layer_subtype": "hook_resid_post",
    "hook_point_head_index": None,
    "context_size": 50,
    "d_in": D,
    "d_sae": N,
    "expansion_factor": N // D,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "cls_token_only": False,
    "use_patches_only": False,
    "normalize_activations": None,
    "architecture": "standard",
    "is_transcoder": False,
    "device": {"__type__": "torch.device", "value": "cuda"},
    "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
}
PRISMA_CLASS = "vit_prisma.sae.config.VisionModelSAERunnerConfig"


def prisma_state(**extra: Tensor) -> dict[str, Tensor]:
    return {**dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), parts(), strict=True)), **extra}


def prisma_folder(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**PRISMA, **config}))
    torch.save(state or prisma_state(), folder / "n_images_2600058.pt")
    torch.save(torch.zeros(N), folder / "n_images_2600058_log_feature_sparsity.pt")
    return folder


def prisma_function(
    act: Callable[[Tensor], Tensor] = torch.relu, normalise: str | None = None
) -> Function:
    W_enc, b_enc, W_dec, b_dec = parts()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z, mu, std = layer_norm(x) if normalise == "layer_norm" else (x, 0, 1)
        if normalise == "constant_norm_rescale":
            coefficient = D**0.5 / x.norm(dim=-1, keepdim=True)
            z, std = x * coefficient, 1 / coefficient
        f = act((z - b_dec) @ W_enc + b_enc)
        return f, (f @ W_dec + b_dec) * std + mu

    return function


@case
def prisma_as_published(folder: Path) -> tuple[Path, Function]:
    return prisma_folder(folder), prisma_function()


@case
def prisma_layer_norm_topk(folder: Path) -> tuple[Path, Function]:
    kind = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "cls_token_only": True}
    path = prisma_folder(folder, normalize_activations="layer_norm", **kind)
    return path, prisma_function(lambda pre: topk(pre).relu(), "layer_norm")


@case
def prisma_constant_norm(folder: Path) -> tuple[Path, Function]:
    kind = "constant_norm_rescale"
    return prisma_folder(folder, normalize_activations=kind), prisma_function(normalise=kind)


@case
def prisma_tanh(folder: Path) -> tuple[Path, Function]:
    path = prisma_folder(folder, activation_fn_str="tanh-relu")
    return path, prisma_function(lambda pre: pre.relu().tanh())


@case
def prisma_gated(folder: Path) -> tuple[Path, Function]:
    gate, r_mag, b_mag = numbers(N, seed=4) / 4, numbers(N, seed=5) / 4, numbers(N, seed=6) / 4
    W_enc, _, W_dec, b_dec = parts()
    extra = {"b_gate": gate, "r_mag": r_mag, "b_mag": b_mag}

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z, mu, std = layer_norm(x)
        centred = z - b_dec
        opened = centred @ W_enc + gate > 0
        f = opened * (centred @ (W_enc * r_mag.exp()) + b_mag).relu()
        return f, (f @ W_dec + b_dec) * std + mu

    kind = {"architecture": "gated", "normalize_activations": "layer_norm"}
    return prisma_folder(folder, prisma_state(**extra), **kind), function


@case
def prisma_transcoder(folder: Path) -> tuple[Path, Function]:
    d_out = D
    W_enc, b_enc, W_dec, _ = parts(d_out)
    b_dec, b_out, W_skip = numbers(D, seed=7), numbers(d_out, seed=8), numbers(d_out, D) / D
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    state |= {"b_dec_out": b_out, "W_skip": W_skip}
    kind = {"is_transcoder": True, "d_out": d_out, "layer_subtype": "ln2.hook_normalized"}
    kind |= {"out_hook_point_layer": 10, "layer_out_subtype": "hook_mlp_out"}

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = ((x - b_dec) @ W_enc + b_enc).relu()
        return f, f @ W_dec + b_out + x @ W_skip.T

    return prisma_folder(folder, state, transcoder_with_skip_connection=True, **kind), function


def _prisma_transcoder_of_each_vector(folder: Path, normalise: str) -> tuple[Path, Function]:
    """The output is given back in the units of the input, in another width too."""
    d_out = D + 2
    W_enc, b_enc, W_dec, _ = parts(d_out)
    b_dec, b_out = numbers(D, seed=7), numbers(d_out, seed=8)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "b_dec_out": b_out}
    kind = {"is_transcoder": True, "d_out": d_out, "normalize_activations": normalise}

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        if normalise == "layer_norm":
            z, mu, std = layer_norm(x)
        else:
            mu, std = 0, x.norm(dim=-1, keepdim=True) / D**0.5
            z = x / std
        f = ((z - b_dec) @ W_enc + b_enc).relu()
        return f, (f @ W_dec + b_out) * std + mu

    return prisma_folder(folder, state, **kind), function


@case
def prisma_transcoder_layer_norm(folder: Path) -> tuple[Path, Function]:
    return _prisma_transcoder_of_each_vector(folder, "layer_norm")


@case
def prisma_transcoder_constant_norm(folder: Path) -> tuple[Path, Function]:
    return _prisma_transcoder_of_each_vector(folder, "constant_norm_rescale")


@case
def prisma_pickled_configuration(folder: Path) -> tuple[Path, Function]:
    config = {**PRISMA, "normalize_activations": "layer_norm", "dtype": torch.float32}
    config |= {"device": torch.device("cpu"), "use_patches_only": True}
    path = folder / "n_images_130.pt"
    save_with(path, PRISMA_CLASS, config, state_dict=prisma_state())
    return path, prisma_function(normalise="layer_norm")


@case
def prisma_gzipped(folder: Path) -> tuple[Path, Function]:
    path = folder / "final.pkl.gz"
    with known_as(PRISMA_CLASS) as cls, gzip.open(path, "wb") as file:
        config = cls()
        config.__dict__.update(PRISMA)
        pickle.dump({"cfg": config, "state_dict": prisma_state()}, file)
    return path, prisma_function()


@case
def prisma_in_the_way_of_saelens_2(folder: Path) -> tuple[Path, Function]:
    path = folder / "final.pt"
    config = {"hook_point": "blocks.9.hook_mlp_out", "hook_point_layer": 9, "d_in": D}
    with known_as("sae_training.config.LanguageModelSAERunnerConfig") as cls:
        made = cls()
        made.__dict__.update(config)
        torch.save({"config": made, "autoencoder": {"state_dict": prisma_state()}}, path)
    return path, prisma_function()


# OpenAI


def openai_file(
    path: Path, act: Any, state: Any = None, *, tied: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_enc, latent_bias, W_dec, pre_bias = parts()
    held = {"pre_bias": pre_bias, "encoder.weight": W_enc.T, "latent_bias": latent_bias}
    held |= {"decoder.linear.weight": W_enc.T} if tied else {"decoder.weight": W_dec.T}
    held |= {"stats_last_nonzero": torch.zeros(N, dtype=torch.int64), "activation": act}
    held |= {"latents_activation_frequency": torch.ones(N), "latents_mean_square": torch.zeros(N)}
    torch.save({**held, "activation_state_dict": state or {}}, path)
    return W_enc, latent_bias, (W_enc.T if tied else W_dec), pre_bias


def openai_case(folder: Path, act: str, state: Any = None, tied: bool = False) -> Any:
    enc, latent_bias, dec, pre_bias = openai_file(folder / "9.pt", act, state, tied=tied)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z, mu, std = layer_norm(x) if act == "TopK" else (x, 0, 1)
        pre = (z - pre_bias) @ enc + latent_bias
        f = {"ReLU": pre.relu(), "Identity": pre, "TopK": topk(pre).relu()}[act]
        return f, (f @ dec + pre_bias) * std + mu

    return folder / "9.pt", function


@case
def openai_topk(folder: Path) -> tuple[Path, Function]:
    return openai_case(folder, "TopK", {"k": K, "postact_fn": "ReLU", "postact_fn_state_dict": {}})


@case
def openai_relu(folder: Path) -> tuple[Path, Function]:
    return openai_case(folder, "ReLU")


@case
def openai_tied(folder: Path) -> tuple[Path, Function]:
    return openai_case(folder, "ReLU", tied=True)


@case
def openai_identity(folder: Path) -> tuple[Path, Function]:
    return openai_case(folder, "Identity")


# CLIP-Scope


@case
def clipscope(folder: Path) -> tuple[Path, Function]:
    enc, _, dec, pre_b = parts()
    path = folder / "22_resid" / "1200013184.pt"
    path.parent.mkdir()
    state = {"pre_b": pre_b, "enc": enc, "dec": dec}
    rest = {"token_count": 1, "dead_latents": torch.zeros(N), "n_iter": 1, "log_id": "22_resid-3a"}
    torch.save({"model_state_dict": state, "n_features": N, "d_in": D, "k": K, **rest}, path)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        latent = topk((x - pre_b) @ enc)
        return latent, latent @ dec + pre_b

    return path, function


@case
def clipscope_calibrated(folder: Path) -> tuple[Path, Function]:
    path, raw = clipscope(folder)
    mean, deviation = numbers(D, seed=9), numbers(D, seed=10).abs() * torch.linspace(0.5, 30, D)
    described = {"format": "sparsight-clipscope-calibration", "format_version": 1}
    described |= {"n_vectors": 257, "about": {}, "mean": mean.tolist()}
    described |= {"deviation": deviation.tolist()}
    path.with_name("1200013184.calibration.json").write_text(json.dumps(described))

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        latent, hat = raw((x - mean) / (deviation + 1e-6))
        return latent, hat * (deviation + 1e-6) + mean

    return path, function


# PatchSAE, Fry

PATCHSAE = {
    "model_name": "openai/clip-vit-base-patch16",
    "block_layer": -2,
    "module_name": "resid",
    "class_token": False,
    "d_in": D,
    "expansion_factor": N // D,
}


@case
def patchsae(folder: Path) -> tuple[Path, Function]:
    path = folder / "2621440.pt"
    name = "sae_training.config.ViTSAERunnerConfig"
    save_with(path, name, PATCHSAE, state_dict=prisma_state())
    return path, prisma_function()


@case
def fry(folder: Path) -> tuple[Path, Function]:
    config = {**PATCHSAE, "model_name": "openai/clip-vit-large-patch14", "class_token": True}
    torch.save({"config": config, "state_dict": prisma_state()}, folder / "final.pt")
    return folder / "final.pt", prisma_function()


# MSAE

MSAE_MEAN, MSAE_FACTOR = numbers(D, seed=11), 3.5


def msae_state(tied: bool = False, **extra: Tensor) -> dict[str, Tensor]:
    encoder, latent_bias, decoder, pre_bias = parts()
    state = {"pre_bias": pre_bias, "encoder": encoder, "latent_bias": latent_bias}
    state |= {"latents_activation_frequency": torch.zeros(N, dtype=torch.int64), **extra}
    return state if tied else {**state, "decoder": decoder}


def msae_function(
    act: Callable[[Tensor], Tensor], cap: float = 0, tied: bool = False, mean: Any = None
) -> Function:
    encoder, latent_bias, decoder, pre_bias = parts()
    centre = MSAE_MEAN if mean is None else mean

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - centre) * MSAE_FACTOR
        f = act((z - pre_bias) @ encoder + latent_bias)
        f = cap * (f / cap).tanh() if cap else f
        out = f @ (encoder.T if tied else decoder) + pre_bias
        return f, out / MSAE_FACTOR + centre

    return function


def msae_file(path: Path, state: dict[str, Tensor], mean: Any = None) -> Path:
    data = {"mean_center": MSAE_MEAN if mean is None else mean}
    data |= {"scaling_factor": MSAE_FACTOR, "target_norm": D**0.5}
    torch.save({"model": state, **data}, path)
    return path


@case
def msae_relu(folder: Path) -> tuple[Path, Function]:
    path = folder / f"{N}_{D}_ReLU_003_False_False_0.0_cc3m_ViT-L~14_train_image.pth"
    return msae_file(path, msae_state()), msae_function(torch.relu)


@case
def msae_topk_capped(folder: Path) -> tuple[Path, Function]:
    path = folder / f"{N}_{D}_TopKReLU_{K}_False_False_2.0_cc3m.pth"
    return msae_file(path, msae_state()), msae_function(lambda pre: topk(pre).relu(), cap=2)


@case
def msae_matryoshka_tied(folder: Path) -> tuple[Path, Function]:
    path = folder / f"{N}_{D}_TopKReLU_{K}_RW_True_False_0.0_cc3m.pth"
    msae_file(path, msae_state(tied=True), 0.25)
    return path, msae_function(torch.relu, tied=True, mean=0.25)


@case
def msae_jump(folder: Path) -> tuple[Path, Function]:
    log = torch.linspace(-2, 0.5, N)
    path = folder / f"{N}_{D}_JumpReLU_False_False_0.0_cc3m.pth"
    msae_file(path, msae_state(**{"activation.log_threshold": log}))
    return path, msae_function(lambda pre: pre * (pre > log.exp()))


@case
def msae_of_newer_files(folder: Path) -> tuple[Path, Function]:
    config = {"n_latents": N, "n_inputs": D, "activation": f"TopK_{K}", "tied": False}
    config |= {"normalize": False, "latent_soft_cap": 30.0}
    data = {"mean_center": MSAE_MEAN, "scaling_factor": MSAE_FACTOR, "target_norm": 1.0}
    whole = {"model_state_dict": msae_state(), "model_class": "Autoencoder"}
    whole |= {"model_config": config, "preprocessing": data, "checkpoint_version": "1.0"}
    torch.save(whole, folder / "topk_k4_x3.pth")
    return folder / "topk_k4_x3.pth", msae_function(topk, cap=30)


# DN-CBM


def dncbm_file(folder: Path, axis: bool) -> tuple[Path, Function]:
    W_enc, bias, W_dec, tied = parts()
    state = {"tied_bias": tied, "encoder._weight": W_enc.T.contiguous(), "encoder._bias": bias}
    state |= {"decoder._weight": W_dec.T.contiguous()}
    state |= {"pre_encoder_bias._bias_reference": tied, "post_decoder_bias._bias_reference": tied}
    if axis:
        state = {key: each[None] for key, each in state.items()}
    torch.save(state, folder / "sparse_autoencoder_final.pt")

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = ((x - tied) @ W_enc + bias).relu()
        return f, f @ W_dec + tied

    return folder / "sparse_autoencoder_final.pt", function


@case
def dncbm(folder: Path) -> tuple[Path, Function]:
    return dncbm_file(folder, axis=False)


@case
def dncbm_with_an_axis_of_components(folder: Path) -> tuple[Path, Function]:
    return dncbm_file(folder, axis=True)


# OpenMOSS Llamascopium

LLAMASCOPIUM = {
    "sae_type": "sae",
    "hook_point_in": "blocks.10.hook_resid_post",
    "hook_point_out": "blocks.10.hook_resid_post",
    "d_model": D,
    "expansion_factor": N // D,
    "use_decoder_bias": True,
    "act_fn": "relu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
}
HOOK = "dataset_average_activation_norm.blocks.10.hook_resid_post"


def llamascopium_folder(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMASCOPIUM, **config}))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "sae_weights.safetensors")
    return folder


def llamascopium_function(
    mask: Callable[[Tensor], Tensor], scale: float = 1.0, out: float | None = None
) -> Function:
    W_E, b_E, W_D, b_D = parts()
    norms = W_D.norm(dim=1)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x / scale @ W_E + b_E
        f = h * mask(h * norms)
        return f, (f @ W_D + b_D) * (scale if out is None else out)

    return function


def llamascopium_state(**extra: Tensor) -> dict[str, Tensor]:
    return {**dict(zip(("W_E", "b_E", "W_D", "b_D"), parts(), strict=True)), **extra}


@case
def llamascopium_relu(folder: Path) -> tuple[Path, Function]:
    path = llamascopium_folder(folder, llamascopium_state(**{HOOK: torch.tensor(7.0)}))
    return path, llamascopium_function(lambda h: h > 0, 7 / D**0.5)


@case
def llamascopium_jumprelu(folder: Path) -> tuple[Path, Function]:
    log = torch.linspace(-2, 0.5, N)
    extra = {"activation_function.log_jumprelu_threshold": log}
    kind = {"act_fn": "jumprelu", "norm_activation": "inference"}
    path = llamascopium_folder(folder, llamascopium_state(**extra), **kind)
    return path, llamascopium_function(lambda h: h > log.exp())


@case
def llamascopium_transcoder(folder: Path) -> tuple[Path, Function]:
    norms = {HOOK: torch.tensor(7.0)}
    norms["dataset_average_activation_norm.blocks.10.hook_mlp_out"] = torch.tensor(3.0)
    kind = {"hook_point_out": "blocks.10.hook_mlp_out"}
    path = llamascopium_folder(folder, llamascopium_state(**norms), **kind)
    return path, llamascopium_function(lambda h: h > 0, 7 / D**0.5, 3 / D**0.5)


@case
def llamascopium_of_the_first_files(folder: Path) -> tuple[Path, Function]:
    W_E, b_E, W_D, b_D = parts()
    state = {"encoder.weight": W_E.T, "encoder.bias": b_E}
    state |= {"decoder.weight": W_D.T, "decoder.bias": b_D}
    state |= {
        f"dataset_average_activation_norm.{side}": torch.tensor(7.0) for side in ("in", "out")
    }
    path = llamascopium_folder(folder, state, act_fn="jumprelu", jump_relu_threshold=0.4)
    return path, llamascopium_function(lambda h: h > 0.4, 7 / D**0.5)


# What other packages make of it


def peer(package: str, task: str, given: dict, folder: Path) -> dict:
    """What another package gives, in a process of its own."""
    if not (peers() / package).is_dir():
        pytest.skip(f"{package} is not in {peers()}")
    torch.save(given, folder / "given.pt")
    script = Path(__file__).parent / "foreign_peers.py"
    command = [sys.executable, script, peers(), task, folder / "given.pt", folder / "made.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "made.pt", weights_only=True)
