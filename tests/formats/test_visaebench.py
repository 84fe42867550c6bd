from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exchange import K, N, exchange, trained_like
from sparsight.errors import UserError
from sparsight.formats import find, read
from sparsight.sae import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK


def test_visaebench_and_we_read_each_other_alike(tmp_path: Path) -> None:
    configs = {
        "topk": SAEConfig(N, sparsity=TopK(K), normaliser="standardise"),
        "batch topk": SAEConfig(N, sparsity=BatchTopK(K)),
        "relu": SAEConfig(N, sparsity=ReLU(), subtract_b_dec=False),
        "jumprelu": SAEConfig(N, sparsity=JumpReLU()),
    }
    saes = {name: trained_like(each, seed) for seed, (name, each) in enumerate(configs.items())}
    cases = {"topk", "batchtopk", "running", "jumprelu"}
    exchange("visaebench", "visaebench", saes, tmp_path).check(cases)


def _write(folder: Path, text: str) -> Path:
    tensors = {
        "encoder.weight": torch.tensor([[1.0, 2.0], [-3.0, 1.0]]),
        "encoder.bias": torch.tensor([0.5, 1.0]),
        "decoder.weight": torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.yaml").write_text(text)
    return folder


def test_a_yaml_configuration_and_rows_of_latents_are_read(tmp_path: Path) -> None:
    text = "sae_type: batchtopk\nk: 1\nthreshold: 3.5\nbackbone: clip\ncolour: 1\n"
    found = read(_write(tmp_path, text))
    assert found.unknown == ("colour",) and found.metadata["model"] == {"id": "clip"}
    sae = found.build()
    # Scores of (1, 1): 3.5 and -1; of (-1, 0): -0.5 and 4; of (0, 1): 2.5 and 2.
    code = sae.encode(torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(code.dense(), torch.tensor([[3.5, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(
        sae.decode(code), torch.tensor([[3.5, 0.0], [8.0, 12.0], [0.0, 0.0]])
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activation: topk\n", "k is None"),
        ("activation: topk\nk: 1\ninput_dim: 3\n", "input_dim is 3"),
        ("activation: batchtopk\nk: 1\nthreshold: high\n", "threshold is 'high'"),
        ("activation: &a [*a]\n", "aliases"),
        ("activation: [topk\n", "damaged"),
        ("- 1\n", "not an object"),
    ],
)
def test_a_strange_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as told:
        read(_write(tmp_path, text))
    assert hasattr(told.value, "exit_code")


def test_what_visaebench_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no Gated"):
        find("visaebench").save(trained_like(SAEConfig(N, sparsity=Gated()), 0), tmp_path)


def test_its_configuration_says_what_it_is(tmp_path: Path) -> None:
    find("visaebench").save(trained_like(SAEConfig(N, sparsity=BatchTopK(K)), 0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["activation"] == "batchtopk" and config["k"] == K


def test_only_files_that_others_wrote_ask_for_standardised_vectors(tmp_path: Path) -> None:
    sae = trained_like(SAEConfig(N, sparsity=TopK(K), normaliser="standardise"), 0)
    find("visaebench").save(sae, tmp_path)
    ours = read(tmp_path)
    assert ours.notes == () and ours.unknown == ()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("normaliser") == "folded"
    path.write_text(json.dumps(config))
    assert "give it such vectors" in read(tmp_path).notes[0]
    path.write_text(json.dumps({**config, "normaliser": "other"}))
    theirs = read(tmp_path)
    assert theirs.notes and theirs.unknown == ("normaliser",)
