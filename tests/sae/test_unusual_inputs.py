"""Vectors and parameters of any float type, vectors with infinity or NaN, invalid widths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from architecture_cases import ARCHITECTURES
from sparsight.errors import UserError
from sparsight.kernels import using
from sparsight.sae import (
    BatchTopK,
    Gated,
    JumpReLU,
    Normaliser,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    SparseCode,
    TopK,
)

D = 16
NORMALISERS = ("scale", "standardise", "none", "layer_norm", "constant_norm")
HALVES = (torch.float16, torch.bfloat16)


def _sae(config: SAEConfig | None = None, normaliser: str = "scale", **more: Any):
    config = config or SAEConfig(64, sparsity=TopK(8))
    config = dataclasses.replace(config, normaliser=normaliser)
    sae = SparseAutoencoder(D, config, **more)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(sae.n_latents, generator=generator)
        sae.b_dec += 0.1 * torch.randn(sae.d_out, generator=generator)
    return sae.requires_grad_(False).eval()


def _vectors(rows: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.unchecked
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64, torch.int64])
def test_vectors_of_any_type_give_the_same_result_as_their_float32_copies(
    dtype: torch.dtype, normaliser: str
) -> None:
    sae, x = _sae(normaliser=normaliser), _vectors().to(dtype)
    out, expected = sae(x), sae(x.float())
    assert torch.equal(out.x_hat, expected.x_hat) and out.x_hat.dtype == torch.float32
    assert torch.equal(out.code.indices, expected.code.indices)
    assert torch.equal(sae.decode(sae.encode(x)), expected.x_hat)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_sae_in_half_precision_computes_like_its_float32_copy(
    name: str, dtype: torch.dtype
) -> None:
    half = _sae(ARCHITECTURES[name], "none" if name == "matching pursuit" else "scale").to(dtype)
    full = SparseAutoencoder(D, half.config, blank=True)
    full.load_state_dict(half.state_dict())
    full.requires_grad_(False).eval()
    for x in (_vectors(), _vectors().to(dtype)):
        assert torch.equal(half(x).x_hat, full(x).x_hat)
    assert half.fingerprint() == full.fingerprint()
    folded, expected = half.fold(), full.fold()
    for key, each in folded.state_dict().items():
        assert torch.equal(each, expected.state_dict()[key].to(dtype)), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_sae_in_double_precision_computes_in_it(name: str) -> None:
    sae = _sae(ARCHITECTURES[name], "none" if name == "matching pursuit" else "scale")
    expected = sae(_vectors()).x_hat
    out = sae.double()(_vectors())
    assert out.x_hat.dtype == out.code.values.dtype == torch.float64
    torch.testing.assert_close(out.x_hat.float(), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_beyond_the_range_of_float16_is_measured() -> None:
    sae, x = _sae(normaliser="constant_norm"), torch.full((1, D), 3e4, dtype=torch.float16)
    assert torch.isfinite(sae(x).x_hat).all()


def test_autocast_does_not_lower_the_precision_of_an_sae() -> None:
    sae, x = _sae(SAEConfig(64, sparsity=Gated())), _vectors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sae(x)
    assert torch.equal(out.x_hat, sae(x).x_hat)


def test_constraints_of_an_sae_in_half_precision_are_computed_in_float32() -> None:
    sae = _sae(SAEConfig(64, sparsity=JumpReLU())).half()
    with torch.no_grad():
        sae.W_dec.mul_(1e-5)
        sae.threshold.sub_(5)
        full = sae.W_dec.float()
        sae.constrain()
    torch.testing.assert_close(sae.W_dec, (full / full.norm(dim=1, keepdim=True)).half())
    assert float(sae.threshold.max()) == 0


def test_folding_beyond_the_range_of_half_precision_names_the_remedy() -> None:
    units = Normaliser(torch.zeros(D), torch.tensor([1e6]), "scale")
    sae = _sae(normaliser="scale")
    sae.normaliser = units
    sae.fold()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.data = parameter.data.half()
    with pytest.raises(UserError, match=r"W_dec .* beyond the range of torch.float16.*float\(\)"):
        sae.fold()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernels", ["auto", "torch", "dense"])
@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_vector_with_infinity_or_nan_has_a_code_and_a_reconstruction_of_nan(
    name: str, rows: int, kernels: str, bad: float
) -> None:
    sae, x = _sae(ARCHITECTURES[name], "none"), _vectors(rows)
    with using(kernels):
        whole = sae(x)
        x[1, 3] = bad
        out = sae(x)
    assert out.x_hat[1].isnan().all() and out.code.dense()[1].isnan().any()
    others = torch.arange(rows) != 1
    assert torch.equal(out.x_hat[others], whole.x_hat[others])
    assert torch.equal(out.code.l0[others], whole.code.l0[others])


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_nan_passes_through_every_normaliser_and_a_transcoder(normaliser: str) -> None:
    config = SAEConfig(64, sparsity=TopK(4), subtract_b_dec=False, skip=True)
    for sae in (_sae(normaliser=normaliser), _sae(config, normaliser, d_out=D + 1)):
        x = _vectors()
        x[2, 0] = math.nan
        assert sae(x).x_hat.isnan().any(dim=1).tolist() == [False, False, True, False, False]


def test_a_vector_with_infinity_or_nan_takes_no_places_in_a_batch() -> None:
    sae, x = _sae(SAEConfig(64, sparsity=BatchTopK(4))).train(), _vectors(3)
    x[0] = math.nan
    code = sae.encode(x)
    assert code.l0[0] == 1 and int(code.l0[1:].sum()) >= 8


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_without_a_vector_gives_an_empty_code(name: str, normaliser: str) -> None:
    sae = _sae(ARCHITECTURES[name], normaliser)
    for kernels in ("auto", "dense"):
        with using(kernels):
            out = sae(torch.zeros(0, D))
        assert len(out.code) == 0 and out.x_hat.shape == (0, D)
        assert sae.decode(out.code).shape == (0, D)


@pytest.mark.unchecked
@pytest.mark.parametrize("width", [0, -1, 1.5, "8", None, True])
def test_an_invalid_width_is_named(width: Any) -> None:
    with pytest.raises(UserError, match=r"d_in is .*whole number of at least 1"):
        SparseAutoencoder(width, SAEConfig(4, sparsity=TopK(1)))
    if width is not None:
        with pytest.raises(UserError, match=r"d_out is .*whole number of at least 1"):
            SparseAutoencoder(4, SAEConfig(4, sparsity=TopK(1), subtract_b_dec=False), d_out=width)
        with pytest.raises(UserError, match="n_latents"):
            SAEConfig(n_latents=width, sparsity=TopK(1))
        with pytest.raises(UserError, match=r"sparsity\.k"):
            TopK(k=width)


def test_parts_of_another_width_are_named() -> None:
    with pytest.raises(UserError, match=r"k is 9, but there are only 8 latents"):
        SparseAutoencoder(4, SAEConfig(expansion=2, sparsity=TopK(9)))
    with pytest.raises(UserError, match=r"normaliser has width 3; expected 4"):
        SparseAutoencoder(4, normaliser=Normaliser.identity(3))
    with pytest.raises(UserError, match=r"sample has the shape \[0, 4\]"):
        SparseAutoencoder(4, sample=torch.zeros(0, 4))
    with pytest.raises(UserError, match=r"layer_norm.*d_in is 1"):
        SparseAutoencoder(1, SAEConfig(4, sparsity=TopK(1), normaliser="layer_norm"))
    assert SparseAutoencoder(1, SAEConfig(4, sparsity=TopK(1)))(torch.ones(2, 1)).x_hat.shape


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("x", "told"),
    [
        (_vectors().numpy(), "got ndarray"),
        (_vectors().to(torch.complex64), "got torch.complex64"),
        (_vectors()[0], r"got a tensor of shape \[16\]"),
        (_vectors()[:, :3], r"got a tensor of shape \[5, 3\]"),
    ],
)
def test_anything_but_a_batch_of_vectors_is_refused(x: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        _sae()(x)


def test_a_code_of_another_dictionary_is_refused() -> None:
    code = SparseCode(torch.tensor([3]), torch.ones(1), torch.tensor([0, 1]), 65)
    with pytest.raises(UserError, match="has 65 latents, but the SAE has 64"):
        _sae().decode(code)


@pytest.mark.parametrize("name", ["topk", "tied topk", "gated", "archetypal"])
@pytest.mark.parametrize("normaliser", ["scale", "none"])
def test_folding_keeps_frozen_parameters_frozen(name: str, normaliser: str) -> None:
    frozen = _sae(ARCHITECTURES[name], normaliser).fold()
    assert not any(each.requires_grad for each in frozen.parameters()) and not frozen.training
    frozen(_vectors()).x_hat.numpy()
    learning = _sae(ARCHITECTURES[name], normaliser).requires_grad_(True).train()
    learning.b_enc.requires_grad_(False)
    folded = learning.fold()
    assert folded.training
    learns = {key: each.requires_grad for key, each in folded.named_parameters()}
    assert not learns.pop("b_enc") and all(learns.values())


def test_relu_folds_like_the_others() -> None:
    assert not _sae(SAEConfig(64, sparsity=ReLU())).fold().W_dec.requires_grad
