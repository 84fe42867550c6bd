from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exchange import D, K, N, exchange, trained_like
from sparsight.errors import UserError
from sparsight.formats import find, read
from sparsight.sae import AbsTopK, BatchTopK, GroupMax, SAEConfig, SparseAutoencoder, TopK

CASES = {"topk", "groupmax", "expansion", "skip", "transcoder", "skip transcoder"}


def test_sparsify_and_we_read_each_other_alike(tmp_path: Path) -> None:
    apart = {"subtract_b_dec": False}
    configs = {
        "topk": SAEConfig(N, sparsity=TopK(K)),
        "groupmax": SAEConfig(N, sparsity=GroupMax(K), normaliser="none"),
        "standardised": SAEConfig(N, sparsity=TopK(K), normaliser="standardise"),
        "bias apart": SAEConfig(N, sparsity=TopK(K), **apart),
        "tied": SAEConfig(N, sparsity=TopK(K), tied=True),
    }
    saes = {name: trained_like(each, seed) for seed, (name, each) in enumerate(configs.items())}
    transcoder = SAEConfig(N, sparsity=TopK(K), skip=True, **apart)
    saes["transcoder"] = trained_like(transcoder, 9, d_out=D)
    exchange("sparsify", "sparsify", saes, tmp_path).check(CASES)


def _write(folder: Path, **settings: object) -> Path:
    """Two latents of width 2; worked out by hand below."""
    tensors = {
        "encoder.weight": torch.tensor([[1.0, 2.0], [-3.0, 1.0]]),
        "encoder.bias": torch.tensor([0.5, -1.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
        "b_dec": torch.tensor([1.0, 1.0]),
    }
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 2, "k": 1, "num_latents": 2, **settings}))
    return folder


def test_old_signed_checkpoints_keep_the_largest_in_absolute_value(tmp_path: Path) -> None:
    sae = read(_write(tmp_path, signed=True)).build()
    assert isinstance(sae.config.sparsity, AbsTopK)
    # x - b_dec is (1, 1): scores 3.5 and -3; then (2, 0): scores 2.5 and -7.
    x = torch.tensor([[2.0, 2.0], [3.0, 1.0]])
    code = sae.encode(x)
    torch.testing.assert_close(code.dense(), torch.tensor([[3.5, 0.0], [0.0, -7.0]]))
    torch.testing.assert_close(sae.decode(code), torch.tensor([[4.5, 1.0], [-13.0, -20.0]]))


def test_the_folder_names_the_site_and_strange_keys_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "layers.7.mlp"
    folder.mkdir()
    found = read(_write(folder, wings=2))
    assert found.metadata["site"] == "blocks.7.mlp_out"
    assert found.unknown == ("wings",)
    assert found.build().metadata["source"]["unknown"] == ["wings"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "jump"}, "activation is 'jump'"),
        ({"d_in": 3}, "d_in is 3"),
        ({"k": 5}, "k is 5"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(Exception, match=message) as told:
        read(_write(tmp_path, **settings)).build()
    assert hasattr(told.value, "exit_code")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SAEConfig(N, sparsity=BatchTopK(K)), "has no BatchTopK"),
        (SAEConfig(N, sparsity=TopK(K, rectify=False)), "rectify"),
        (SAEConfig(N, sparsity=TopK(K), soft_cap=3.0), "soft cap"),
        (SAEConfig(N, sparsity=TopK(K), normaliser="layer_norm"), "depends on each vector"),
    ],
)
def test_what_sparsify_cannot_hold_is_refused(
    tmp_path: Path, config: SAEConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find("sparsify").save(SparseAutoencoder(D, config), tmp_path)
    assert not list(tmp_path.iterdir())
