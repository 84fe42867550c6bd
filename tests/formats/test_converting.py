from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sparsight.errors import SparsightError, UserError
from sparsight.formats import FORMATS
from sparsight.formats.converting import convert
from sparsight.sae import (
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    Normaliser,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)

D = 12
WRITTEN = [each.name for each in FORMATS if each.can_save]


def _sae(config: SAEConfig) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, D, generator=generator).double() * 3 + 2
    normaliser = Normaliser.fit(config.normaliser, x.mean(0), x.square().mean(0))
    sae = SparseAutoencoder(D, config, normaliser=normaliser, sample=normaliser(x.float()))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if isinstance(config.sparsity, BatchTopK):
            sae.threshold.fill_(0.5)
    return sae.requires_grad_(False).eval()


SPARSITIES = [TopK(4), BatchTopK(4), ReLU(), JumpReLU(), Gated()]


@pytest.mark.parametrize("to", ["sparsight", *WRITTEN])
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda each: type(each).__name__)
def test_what_can_be_written_comes_back_the_same_and_the_rest_is_refused_with_a_reason(
    to: str, sparsity, tmp_path: Path
) -> None:
    sae = _sae(SAEConfig(48, sparsity=sparsity))
    out = tmp_path / "out"
    try:
        done = convert(sae, to, out)
    except UserError as error:
        assert len(str(error)) > 30 and not list(tmp_path.rglob("*.*"))
        return
    assert done.difference < 1e-5
    again = SparseAutoencoder.from_pretrained(done.path)
    x = torch.randn(100, D, generator=torch.Generator().manual_seed(9)) * 3 + 2
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)


def _usual(to: str) -> SparseAutoencoder:
    """An SAE of the kind that most in a format are."""
    if to == "prisma":
        return _sae(SAEConfig(48, sparsity=ReLU()))
    if to in ("saev", "clipscope"):
        sae = _sae(SAEConfig(48, sparsity=TopK(4, rectify=False)))
    elif to == "overcomplete":
        sae = _sae(SAEConfig(48, sparsity=TopK(4), normaliser="none"))
        with torch.no_grad():
            sae.b_dec.zero_()
    else:
        sae = _sae(SAEConfig(48, sparsity=TopK(4)))
    if to == "clipscope":
        with torch.no_grad():
            sae.b_enc.zero_()
    return sae


@pytest.mark.parametrize("to", WRITTEN)
def test_every_format_that_is_written_takes_its_usual_sae(to: str, tmp_path: Path) -> None:
    assert convert(_usual(to), to, tmp_path / "out").difference < 1e-5


def test_an_unsupported_part_is_named_and_leaves_no_files(tmp_path: Path) -> None:
    sae = _sae(SAEConfig(48, sparsity=MatchingPursuit(4)))
    with pytest.raises(UserError, match="MatchingPursuit"):
        convert(sae, "sparsify", tmp_path / "out")
    assert not list(tmp_path.rglob("*.*"))
    layer_norm = _sae(SAEConfig(48, normaliser="layer_norm"))
    with pytest.raises(UserError, match="each vector"):
        convert(layer_norm, "sparsify", tmp_path / "out")


def test_an_unknown_format_is_refused_with_a_list_of_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparsight, .*sparsify"):
        convert(_sae(SAEConfig(48)), "onnx", tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        convert(_sae(SAEConfig(48)), "sparsify", tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_what_reads_back_differently_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = _sae(SAEConfig(48, sparsity=TopK(4)))
    other = dataclasses.replace(sae.config, sparsity=TopK(3))
    wrong = SparseAutoencoder(D, other).eval()
    monkeypatch.setattr("sparsight.formats.converting.load_own", lambda path: wrong)
    with pytest.raises(SparsightError, match="differs by"):
        convert(sae, "sparsight", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_rectified_topk_goes_where_there_is_none_only_when_asked_to(tmp_path: Path) -> None:
    sae = _sae(SAEConfig(48, sparsity=TopK(40)))
    with pytest.raises(UserError, match="negative values"):
        convert(sae, "saev", tmp_path / "out")
    done = convert(sae, "saev", tmp_path / "out", approximate=True)
    assert done.difference > 1e-3
    few = convert(_sae(SAEConfig(48, sparsity=TopK(2))), "saev", tmp_path / "few", approximate=True)
    assert few.difference < 1e-6
