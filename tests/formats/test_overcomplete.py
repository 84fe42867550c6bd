from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from exchange import D, K, N, exchange, trained_like
from sparsight.errors import UserError
from sparsight.formats import find, read
from sparsight.sae import (
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)

CASES = {
    *("relu", "topk", "topk, evaluating", "batchtopk", "jump", "pursuit", "archetypal"),
    *("archetypal jump", "batch norm", "tied", "untied", "identity", "l1", "max_l2", "multiplied"),
}


def _without_bias(config: SAEConfig, seed: int) -> SparseAutoencoder:
    """Its decoder has no bias, so it can be written."""
    sae = trained_like(config, seed)
    sae.b_dec.zero_()
    return sae


def test_overcomplete_and_we_read_each_other_alike(tmp_path: Path) -> None:
    kinds = {
        "topk": TopK(K),
        "relu": ReLU(),
        "jump": JumpReLU(),
        "batch topk": BatchTopK(K),
        "pursuit": MatchingPursuit(K),
    }
    config = {"normaliser": "none", "unit_norm_decoder": False}
    saes = {
        name: _without_bias(SAEConfig(N, sparsity=each, **config), seed)
        for seed, (name, each) in enumerate(kinds.items())
    }
    exchange("overcomplete", "overcomplete", saes, tmp_path).check(CASES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SAEConfig(N, sparsity=TopK(K)), "no bias of the decoder"),
        (SAEConfig(N, sparsity=Gated()), "has no Gated"),
    ],
)
def test_what_overcomplete_cannot_hold_is_refused(
    tmp_path: Path, config: SAEConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find("overcomplete").save(trained_like(config, 0), tmp_path)
    assert not list(tmp_path.iterdir())


def _write(folder: Path, config: dict | None, **more: torch.Tensor) -> Path:
    """Two latents of width 2; the rows of the dictionary have norms 5 and 2."""
    tensors = {
        "encoder.final_block.0.weight": torch.tensor([[1.0, 2.0], [-3.0, 1.0]]),
        "encoder.final_block.0.bias": torch.tensor([0.5, 1.0]),
        "dictionary._weights": torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        "dictionary.multiplier": torch.tensor(2.0).log(),
    }
    torch.save({**tensors, **more}, folder / "sae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_state_dictionary_is_read_with_its_class(tmp_path: Path) -> None:
    found = read(_write(tmp_path, {"class": "TopKSAE", "top_k": 1}))
    assert any("l2" in note for note in found.notes)
    sae = found.build()
    # Scores of (1, 1): 3.5 and -1; of (-1, 0): -0.5 and 4. Rows are (1.2, 1.6) and (0, 2).
    code = sae.encode(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    torch.testing.assert_close(code.dense(), torch.tensor([[3.5, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(sae.decode(code), torch.tensor([[4.2, 5.6], [0.0, 8.0]]))


def test_thresholds_are_logarithms(tmp_path: Path) -> None:
    thresholds = torch.tensor([3.6, 3.9]).log()
    sae = read(_write(tmp_path, None, thresholds=thresholds)).build()
    code = sae.encode(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    torch.testing.assert_close(code.dense(), torch.tensor([[0.0, 0.0], [0.0, 4.0]]))


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (None, {}, "does not state its class"),
        ({"class": "OMPSAE"}, {}, "does not support overcomplete.s OMPSAE"),
        ({"class": "SAE"}, {"Q": torch.ones(3)}, "quantised"),
        ({"class": "TopKSAE"}, {}, "top_k is None"),
        ({"class": "BatchTopKSAE"}, {}, "running_threshold"),
        (
            {"class": "SAE"},
            {"encoder.mlp_blocks.0.0.weight": torch.ones(2, 2)},
            "more than one layer",
        ),
        ({"class": "SAE"}, {"encoder.final_block.1.weight": torch.ones(2)}, "layer norm"),
        ({"class": "SAE", "dictionary_params": {"normalization": "odd"}}, {}, "'odd'"),
    ],
)
def test_an_unsupported_part_is_named(
    tmp_path: Path, config: dict | None, more: dict, message: str
) -> None:
    with pytest.raises(Exception, match=message) as told:
        read(_write(tmp_path, config, **more))
    assert hasattr(told.value, "exit_code")


def test_a_width_that_the_parts_do_not_share_is_named(tmp_path: Path) -> None:
    _write(tmp_path, {"class": "SAE"}, **{"dictionary._weights": torch.ones(2, D)})
    with pytest.raises(Exception, match="width 16") as told:
        read(tmp_path).build()
    assert hasattr(told.value, "exit_code")
