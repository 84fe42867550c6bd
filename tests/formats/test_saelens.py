from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exchange import D, K, N, exchange, trained_like, vectors
from sparsight.errors import UserError
from sparsight.formats import find, read
from sparsight.sae import (
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)

CASES = {
    *("standard", "bias apart", "topk", "rescaled", "abstopk", "jumprelu", "gated", "layer norm"),
    *("gated, bias apart", "constant norm", "matching pursuit", "transcoder", "skip transcoder"),
    *("jumprelu transcoder", "jumprelu skip transcoder", "batchtopk", "batchtopk, training"),
    *("rescaled batchtopk", "rescaled batchtopk, training", "flat", "pursuit to the end"),
}


def test_saelens_and_we_read_each_other_alike(tmp_path: Path) -> None:
    apart = {"subtract_b_dec": False}
    configs = {
        "topk": SAEConfig(N, sparsity=TopK(K)),
        "abs topk": SAEConfig(N, sparsity=AbsTopK(K), normaliser="standardise"),
        "batch topk": SAEConfig(N, sparsity=BatchTopK(K)),
        "relu": SAEConfig(N, sparsity=ReLU(), **apart),
        "jumprelu": SAEConfig(N, sparsity=JumpReLU()),
        "gated": SAEConfig(N, sparsity=Gated()),
        "gated, bias apart": SAEConfig(N, sparsity=Gated(), **apart),
        "pursuit": SAEConfig(N, sparsity=MatchingPursuit(K), normaliser="none"),
        "pursuit that stops": SAEConfig(
            N, sparsity=MatchingPursuit(4 * K, 0.1, stop_on_repeat=True), normaliser="none"
        ),
        "layer norm": SAEConfig(N, sparsity=TopK(K), normaliser="layer_norm"),
        "constant norm": SAEConfig(N, sparsity=JumpReLU(), normaliser="constant_norm"),
    }
    saes = {name: trained_like(each, seed) for seed, (name, each) in enumerate(configs.items())}
    for seed, sparsity in enumerate((ReLU(), JumpReLU(), BatchTopK(K))):
        for skip in (False, True):
            config = SAEConfig(N, sparsity=sparsity, skip=skip, **apart)
            name = f"{type(sparsity).__name__} transcoder, skip {skip}"
            saes[name] = trained_like(config, 20 + seed, d_out=24)
    exchange("saelens", "saelens", saes, tmp_path).check(CASES)


def _write(folder: Path, **settings: object) -> Path:
    sae = trained_like(SAEConfig(N, sparsity=ReLU(), normaliser="none"), 0)
    find("saelens").save(sae, folder)
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_a_saved_sae_names_its_model_and_site_as_saelens_does(tmp_path: Path) -> None:
    sae = trained_like(SAEConfig(N, sparsity=TopK(K)), 0)
    sae.metadata.update(model={"id": "openai/clip"}, site="blocks.3.mlp_out")
    find("saelens").save(sae, tmp_path)
    kept = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (kept["model_name"], kept["hook_name"]) == ("openai/clip", "blocks.3.hook_mlp_out")
    again = read(tmp_path).metadata
    assert again["model"] == {"id": "openai/clip"} and again["site"] == "blocks.3.mlp_out"


def test_a_training_checkpoints_scale_becomes_the_normaliser(tmp_path: Path) -> None:
    before = read(_write(tmp_path)).build()
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 4.0}))
    _write(tmp_path, normalize_activations="expected_average_only_in")
    after = read(tmp_path).build()
    torch.testing.assert_close(after(vectors()).x_hat, before(vectors() * 4).x_hat / 4)


def test_a_fine_tuned_decoder_is_scaled(tmp_path: Path) -> None:
    before = read(_write(tmp_path)).build()
    path = tmp_path / "sae_weights.safetensors"
    save_file({**load_file(path), "scaling_factor": torch.full((N,), 3.0)}, path)
    after = read(tmp_path).build()
    code = before.encode(vectors())
    torch.testing.assert_close(after.encode(vectors()).dense(), code.dense())
    wanted = 3 * before.decode(code) - 2 * before.b_dec
    torch.testing.assert_close(after.decode(code), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "temporal"}, "'temporal' is not supported"),
        ({"normalize_activations": "covariance_whitening"}, "cannot undo"),
        ({"architecture": "topk", "k": None}, "k is None"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"architecture": "jumprelu"}, "threshold is missing"),
        ({"d_in": 17}, "width 17"),
    ],
)
def test_an_unsupported_part_is_named(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(Exception, match=message) as told:
        read(_write(tmp_path, **settings)).build()
    assert hasattr(told.value, "exit_code")


@pytest.mark.parametrize(
    ("config", "d_out", "message"),
    [
        (SAEConfig(N, sparsity=GroupMax(K)), None, "has no GroupMax"),
        (SAEConfig(N, sparsity=MatchingPursuit(K)), None, "cannot be folded"),
        (SAEConfig(N, sparsity=TopK(K), subtract_b_dec=False), D, "for transcoders, has no TopK"),
    ],
)
def test_what_saelens_cannot_hold_is_refused(
    tmp_path: Path, config: SAEConfig, d_out: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find("saelens").save(SparseAutoencoder(D, config, d_out=d_out), tmp_path)


def test_a_matching_pursuit_that_starts_from_x_is_refused_before_anything_is_written(tmp_path):
    config = SAEConfig(N, sparsity=MatchingPursuit(K), normaliser="none", subtract_b_dec=False)
    with pytest.raises(UserError, match="starts from x"):
        find("saelens").save(trained_like(config, 0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
