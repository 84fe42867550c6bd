from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from exchange import D, K, N, exchange, trained_like, vectors
from sparsight.errors import SparsightError, UserError
from sparsight.formats import find, read
from sparsight.sae import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)

CASES = {
    *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"),
    *("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"),
}


def test_dictionary_learning_and_we_read_each_other_alike(tmp_path: Path) -> None:
    apart = {"subtract_b_dec": False}
    configs = {
        "topk": SAEConfig(N, sparsity=TopK(K), normaliser="standardise"),
        "topk, bias apart": SAEConfig(N, sparsity=TopK(K), **apart),
        "batch topk": SAEConfig(N, sparsity=BatchTopK(K)),
        "relu": SAEConfig(N, sparsity=ReLU()),
        "jumprelu": SAEConfig(N, sparsity=JumpReLU()),
        "gated": SAEConfig(N, sparsity=Gated()),
        "gated, bias apart": SAEConfig(N, sparsity=Gated(), **apart),
    }
    saes = {name: trained_like(each, seed) for seed, (name, each) in enumerate(configs.items())}
    exchange("dictionary_learning", "dictionary_learning", saes, tmp_path).check(CASES)


def _write(folder: Path, **trainer: object) -> Path:
    """BatchTopK of two latents, width 2; the fork for vision models spells Matryoshka otherwise."""
    tensors = {
        "W_enc": torch.tensor([[1.0, -3.0], [2.0, 1.0]]),
        "b_enc": torch.tensor([0.5, 1.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
        "b_dec": torch.tensor([1.0, 1.0]),
        "k": torch.tensor(1),
        "threshold": torch.tensor(3.0),
        "group_sizes": torch.tensor([1, 1]),
    }
    torch.save(tensors, folder / "ae.pt")
    settings = {"dict_class": "MatroyshkaBatchTopKSAE", "k": 1, "layer": 22, "lm_name": "clip"}
    (folder / "config.json").write_text(json.dumps({"trainer": settings | trainer}))
    return folder


def test_the_fork_for_vision_models_is_read(tmp_path: Path) -> None:
    found = read(_write(tmp_path, submodule_name="resid_post"))
    assert found.metadata["site"] == "blocks.22.resid_post"
    assert found.metadata["group_sizes"] == [1, 1]
    sae = found.build()
    # x - b_dec is (1, 1): scores 3.5 and -1; then (-1, 0): -0.5 and 4; then (1, 0.75): 3 and -1.25.
    x = torch.tensor([[2.0, 2.0], [0.0, 1.0], [2.0, 1.75]])
    code = sae.encode(x)
    torch.testing.assert_close(code.dense(), torch.tensor([[3.5, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(
        sae.decode(code), torch.tensor([[4.5, 1.0], [9.0, 13.0], [1.0, 1.0]])
    )


@pytest.mark.parametrize(
    ("module", "site"),
    [("post_projection", "embedding"), ("blocks.3.mlp_out", "blocks.3.mlp_out"), ("odd", None)],
)
def test_the_site_is_taken_where_it_is_known(tmp_path: Path, module: str, site: str | None) -> None:
    found = read(_write(tmp_path, submodule_name=module, layer=-1))
    assert found.metadata.get("site") == site


def test_checkpoints_within_a_run_find_its_configuration(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_100.pt")
    assert read(tmp_path / "checkpoints" / "ae_100.pt").metadata["model"] == {"id": "clip"}


def test_a_runs_checkpoint_gets_the_norm_of_its_activations_back(tmp_path: Path) -> None:
    before = read(_write(tmp_path)).build()
    inside = torch.load(tmp_path / "ae.pt")
    backup = {"step": 5, "ae": inside, "optimizer": {}, "config": {}, "norm_factor": 10.0}
    torch.save(backup, tmp_path / "ae.pt")
    after = read(tmp_path).build()
    x = vectors()[:, :2] / 5
    torch.testing.assert_close(after(10 * x).x_hat, 10 * before(x).x_hat)


def test_two_classes_with_the_same_tensors_need_a_configuration(tmp_path: Path) -> None:
    sae = trained_like(SAEConfig(N, sparsity=TopK(K)), 0)
    find("dictionary_learning").save(sae, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="BatchTopKSAE have the same tensors"):
        read(tmp_path)


def test_a_class_that_the_tensors_are_not_of_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dict_class is 'AutoEncoder'"):
        read(_write(tmp_path, dict_class="AutoEncoder"))


def test_k_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    tensors = torch.load(_write(tmp_path, k="many") / "ae.pt")
    torch.save({**tensors, "k": torch.tensor([1, 2])}, tmp_path / "ae.pt")
    with pytest.raises(SparsightError, match="k is 'many'"):
        read(tmp_path)


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = SAEConfig(N, sparsity=ReLU(), subtract_b_dec=False)
    with pytest.raises(UserError, match="no transcoders"):
        find("dictionary_learning").save(SparseAutoencoder(D, config, d_out=D), tmp_path)
