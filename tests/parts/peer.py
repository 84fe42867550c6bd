"""Runs one package that has a format of its own, in a process of its own, on files.

`python peer.py PACKAGE FOLDER`: FOLDER has the vectors `x.safetensors`. Writes into FOLDER/theirs a
folder a case, with a checkpoint as the package writes it and what it gives for x; reads each folder
of FOLDER/ours with the package's loader, and puts beside the checkpoint what that gives for x.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from stubs import stub

D, N, K = 16, 64, 4
OUTPUT = "output.safetensors"

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Codes, dense, and reconstructions of vectors."""


def dense(values: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(len(values), N).scatter_add(1, indices, values)


def fill(module: nn.Module, x: Tensor, seed: int) -> None:
    """Weights as after training: the encoder near the decoder, biases near the data's mean."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = nn.functional.normalize(normal(N, D), dim=1) * (0.5 + torch.rand(N, 1))
    spread = x.norm(dim=1).median()
    for name, each in [*module.named_parameters(), *module.named_buffers()]:
        shape = tuple(each.shape)
        if name.endswith("W_skip"):
            new = 0.1 * normal(*shape)
        elif shape in ((N, D), (D, N)):
            new = rows + 0.05 * normal(N, D)
            new = new.T if shape == (D, N) else new
        elif shape == (D,):
            new = x.mean(dim=0) + 0.1 * normal(D)
        elif shape == (N,) and "threshold" in name:
            new = 0.1 * spread * torch.rand(N, generator=generator) + 0.01
        elif shape == (N,):
            new = 0.1 * normal(N)
        else:
            continue
        each.data.copy_(new)


def sparsify(folder: Path, x: Tensor) -> None:
    stub("accelerate")
    # Where Triton is installed it is taken for a GPU's, and fails for want of one.
    sys.modules["triton"] = None  # type: ignore[assignment]
    from sparsify import SparseCoder, SparseCoderConfig

    def run(coder: Any) -> Run:
        def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
            found = coder(x)
            return dense(found.latent_acts, found.latent_indices), found.sae_out

        return outputs

    for seed, (name, settings) in enumerate(
        {
            "topk": {},
            "groupmax": {"activation": "groupmax"},
            "expansion": {"num_latents": 0, "expansion_factor": 4},
            "skip": {"skip_connection": True},
            "transcoder": {"transcode": True},
            "skip transcoder": {"transcode": True, "skip_connection": True},
        }.items()
    ):
        coder = SparseCoder(D, SparseCoderConfig(**{"num_latents": N, "k": K} | settings))
        fill(coder, x, seed)
        coder.save_to_disk(folder / "theirs" / name)
        output(folder / "theirs" / name, run(coder), x)
    for place in ours(folder):
        output(place, run(SparseCoder.load_from_disk(place)), x)


def saelens(folder: Path, x: Tensor) -> None:
    stub("wandb", "babe", "nltk", "dotenv", "plotly", "plotly_express", "tenacity")
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class

    def run(sae: Any) -> Run:
        return lambda x: (sae.encode(x), sae(x))

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "standard": ("standard", {}),
        "bias apart": ("standard", {"apply_b_dec_to_input": False}),
        "topk": ("topk", {"k": K}),
        "rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "abstopk": ("abstopk", {"k": K}),
        "jumprelu": ("jumprelu", {}),
        "gated": ("gated", {}),
        "gated, bias apart": ("gated", {"apply_b_dec_to_input": False}),
        "layer norm": ("standard", {"normalize_activations": "layer_norm"}),
        "constant norm": ("topk", {"k": K, "normalize_activations": "constant_norm_rescale"}),
        "matching pursuit": ("matching_pursuit", {"max_iterations": 4 * K}),
        "pursuit to the end": (
            "matching_pursuit",
            {"max_iterations": K, "stop_on_duplicate_support": False, "residual_threshold": 0.5},
        ),
        "transcoder": ("transcoder", {"d_out": D, "apply_b_dec_to_input": False}),
        "skip transcoder": ("skip_transcoder", {"d_out": D, "apply_b_dec_to_input": False}),
        "jumprelu transcoder": ("jumprelu_transcoder", {"d_out": D, "apply_b_dec_to_input": False}),
        "jumprelu skip transcoder": (
            "jumprelu_skip_transcoder",
            {"d_out": D, "apply_b_dec_to_input": False},
        ),
    }
    for seed, (name, (architecture, settings)) in enumerate(cases.items()):
        kind, configuration = get_sae_class(architecture)
        sae = kind(configuration(d_in=D, d_sae=N, **settings))
        sae.cfg.metadata.model_name = "openai/clip-vit-base-patch32"
        sae.cfg.metadata.hook_name = "blocks.9.hook_resid_post"
        fill(sae, x, seed)
        if architecture == "matching_pursuit":
            sae.W_dec.data = nn.functional.normalize(sae.W_dec.data, dim=1)
        place = folder / "theirs" / name
        sae.save_model(place)
        output(place, run(sae), x)
    for name, architecture in {"batchtopk": "batchtopk", "rescaled batchtopk": "batchtopk"}.items():
        kind, configuration = get_sae_training_class(architecture)
        rescaled = name.startswith("rescaled")
        sae = kind(configuration(d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=rescaled))
        fill(sae, x, 20)
        sae.topk_threshold.fill_(1.3)
        place = folder / "theirs" / name
        sae.save_inference_model(place)
        exported = SAE.load_from_disk(place)
        output(place, run(exported), x)
        place = folder / "theirs" / f"{name}, training"
        sae.save_model(place)
        output(place, run(exported), x)
    old = folder / "theirs" / "flat"
    old.mkdir()
    for file in (folder / "theirs" / "topk").iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    before = {
        "d_in": D,
        "d_sae": N,
        "dtype": "torch.float32",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "hook_point": "blocks.9.hook_resid_post",
        "model_name": "clip",
        "normalize_activations": None,
        "prepend_bos": True,
    }
    (old / "cfg.json").write_text(json.dumps(before))
    output(old, run(SAE.load_from_disk(old)), x)
    for place in ours(folder):
        output(place, run(SAE.load_from_disk(place)), x)


def dictionary_learning(folder: Path, x: Tensor) -> None:
    stub("nnsight", "zstandard", "datasets")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    def run(sae: Any) -> Run:
        return lambda x: (sae.encode(x), sae(x))

    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "AutoEncoder": (dictionary.AutoEncoder, {}),
        "AutoEncoderNew": (dictionary.AutoEncoderNew, {}),
        "GatedAutoEncoder": (dictionary.GatedAutoEncoder, {}),
        "JumpReluAutoEncoder": (dictionary.JumpReluAutoEncoder, {}),
        "AutoEncoderTopK": (AutoEncoderTopK, {"k": K}),
        "BatchTopKSAE": (BatchTopKSAE, {"k": K}),
        "MatryoshkaBatchTopKSAE": (
            MatryoshkaBatchTopKSAE,
            {"k": K, "group_sizes": [N // 4, N // 4, N // 2]},
        ),
    }
    for seed, (name, (kind, settings)) in enumerate(classes.items()):
        sae = kind(D, N, **settings)
        fill(sae, x, seed)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            sae.threshold.fill_(0.8)
        place = folder / "theirs" / name
        place.mkdir()
        torch.save(sae.state_dict(), place / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 9}
        trainer |= {"lm_name": "openai/clip-vit-large-patch14-336", **settings}
        (place / "config.json").write_text(json.dumps({"trainer": trainer}))
        output(place, run(load_dictionary(str(place), "cpu")[0]), x)
    for place in ours(folder):
        output(place, run(load_dictionary(str(place), "cpu")[0]), x)


def overcomplete(folder: Path, x: Tensor) -> None:
    stub("torchvision", "timm", "cv2", "skimage", replace=["overcomplete.visualization"])
    from overcomplete import sae as saes
    from overcomplete.sae.rasae import RAJumpSAE, RATopKSAE

    kinds: dict[str, Any] = {
        each: getattr(saes, each)
        for each in ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "MpSAE")
        if hasattr(saes, each)
    }

    def run(sae: Any) -> Run:
        return lambda x: (sae.encode(x)[1], sae.decode(sae.encode(x)[1]))

    points = x[:24].clone()
    cases: dict[str, Any] = {
        "relu": kinds["SAE"](D, N),
        "topk": kinds["TopKSAE"](D, N, top_k=K),
        "batchtopk": kinds["BatchTopKSAE"](D, N, top_k=K * len(x)),
        "jump": kinds["JumpSAE"](D, N),
        "pursuit": kinds["MpSAE"](D, N, k=K),
        "archetypal": RATopKSAE(D, N, points=points, top_k=K, delta=0.7),
        "archetypal jump": RAJumpSAE(D, N, points=points),
        "batch norm": kinds["TopKSAE"](D, N, top_k=K, encoder_module="mlp_bn_1"),
        "tied": kinds["TopKSAE"](D, N, top_k=K).tied(bias=True),
        "untied": kinds["TopKSAE"](D, N, top_k=K).untied(),
        **{
            kind: kinds["TopKSAE"](D, N, top_k=K, dictionary_params={"normalization": kind})
            for kind in ("identity", "l1", "max_l2")
        },
        "multiplied": kinds["SAE"](D, N, dictionary_params={"use_multiplier": True}),
    }
    for seed, (name, sae) in enumerate(cases.items()):
        fill(sae, x, seed)
        if hasattr(sae.dictionary, "C"):
            sae.dictionary.C.copy_(points)
            sae.dictionary.W.data = torch.randn(N, len(points))
            sae.dictionary.Relax.data = torch.randn(N, D)
        if hasattr(sae, "thresholds"):
            sae.thresholds.data = sae.thresholds.data.log()
        if name == "multiplied":
            sae.dictionary.multiplier.data.fill_(0.3)
        if name in ("batch norm", "batchtopk"):
            sae.train()
            sae(x)
        place = folder / "theirs" / name
        place.mkdir()
        # Saved while training: the dictionary is normalised once it is asked for.
        torch.save(sae, place / "model.pt")
        sae.eval()
        output(place, run(sae), x)
        if name == "topk":
            place = folder / "theirs" / "topk, evaluating"
            place.mkdir()
            torch.save(sae, place / "model.pt")
            output(place, run(sae), x)
    for place in ours(folder):
        config = json.loads((place / "config.json").read_text())
        kind = kinds[config.pop("class")]
        sae = kind(config.pop("input_shape"), config.pop("nb_concepts"), **config)
        sae.load_state_dict(torch.load(place / "sae.pt"))
        sae.eval()
        output(place, run(sae), x)


def visaebench(folder: Path, x: Tensor) -> None:
    # Its vision models, pictures and metrics.
    rooms = [f"visaebench.{each}" for each in ("backbones", "core", "data", "metrics")]
    stub(replace=rooms)
    from visaebench.hub.loader import load_sae

    def run(sae: Any) -> Run:
        return lambda x: (sae.encode(x), sae.decode(sae.encode(x)))

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    simple = {
        "encoder.weight": normal(N, D),
        "encoder.bias": normal(N),
        "decoder.weight": normal(N, D),
        "decoder.bias": normal(D),
    }
    layers = {
        "encoder.final_block.0.weight": normal(N, D),
        "encoder.final_block.0.bias": normal(N),
        "dictionary._weights": normal(N, D),
        "dictionary.multiplier": torch.tensor(0.2),
    }
    cases: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
        "topk": ({"activation": "topk", "k": K}, simple),
        "batchtopk": ({"sae_type": "BatchTopK", "k": K, "threshold": 1.5}, layers),
        "running": (
            {"activation": "batchtopk", "k": K},
            {**layers, "_running_threshold": torch.tensor(2.0)},
        ),
        "jumprelu": ({"activation": "jumprelu"}, {**simple, "jump_thresholds": normal(N).abs()}),
    }
    for name, (config, tensors) in cases.items():
        place = folder / "theirs" / name
        place.mkdir()
        torch.save(tensors, place / "sae.pt")
        (place / "config.json").write_text(json.dumps({**config, "input_dim": D, "hidden_dim": N}))
        output(place, run(load_sae(str(place), device="cpu")), x)
    for place in ours(folder):
        output(place, run(load_sae(str(place), device="cpu")), x)


def ours(folder: Path) -> list[Path]:
    return sorted((folder / "ours").iterdir())


@torch.no_grad()
def output(place: Path, run: Run, x: Tensor) -> None:
    code, x_hat = run(x.clone())
    save_file({"code": code.contiguous(), "x_hat": x_hat.contiguous()}, place / OUTPUT)


def main(package: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (folder / "theirs").mkdir()
    globals()[package](folder, load_file(folder / "x.safetensors")["x"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
