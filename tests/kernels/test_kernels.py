from __future__ import annotations

import math

import pytest
import torch
from step_parts import NEEDS_INT8

from sparsight.kernels import bounds, decode_topk, dense, encode_topk, selection

D_IN, N_LATENTS, K, BATCH = 12, 40, 5, 30


def _inputs(dtype: torch.dtype = torch.float64, massive: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64)
    if massive:
        x[:, :2] *= 100
    shapes = [(N_LATENTS, D_IN), (N_LATENTS,), (N_LATENTS, D_IN), (D_IN,)]
    parameters = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [each.to(dtype).requires_grad_() for each in (x, *parameters)]


def _gradients(encode, decode, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    x, W_enc, b_enc, W_dec, b_dec = inputs
    values, indices = encode(x, W_enc, b_enc, b_dec, K)
    x_hat = decode(values, indices, W_dec, b_dec)
    # Both sides of the loss, so that x gets a gradient from each.
    loss = (x_hat - x).square().sum() + values.pow(3).sum()
    return [x_hat, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("massive", [False, True])
def test_gradients_of_the_sparse_step_match_plain_autograd(massive: bool) -> None:
    ours = _gradients(encode_topk, decode_topk, _inputs(massive=massive))
    truth = _gradients(dense.encode_topk, dense.decode_topk, _inputs(massive=massive))
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-9)


def test_the_gradients_pass_a_finite_difference_check() -> None:
    x, W_enc, b_enc, W_dec, b_dec = (each.detach() for each in _inputs())
    small = (x[:3, :4], W_enc[:9, :4], b_enc[:9], W_dec[:9, :4], b_dec[:4])

    def reconstruct(*inputs: torch.Tensor) -> torch.Tensor:
        values, indices = encode_topk(*inputs[:3], inputs[4], 3)
        return decode_topk(values, indices, inputs[3], inputs[4])

    inputs = [each.clone().requires_grad_() for each in small]
    assert torch.autograd.gradcheck(reconstruct, inputs, eps=1e-7)


def test_tiles_of_rows_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc, _, b_dec = (each.detach() for each in _inputs())
    whole = encode_topk(x, W_enc, b_enc, b_dec, K)
    monkeypatch.setitem(selection.TILE_ELEMENTS, "cpu", 3 * N_LATENTS)
    tiled = encode_topk(x, W_enc, b_enc, b_dec, K)
    assert torch.equal(whole[1].sort().values, tiled[1].sort().values)


@pytest.mark.parametrize("massive", [False, True])
def test_selection_in_bfloat16_chooses_the_same_as_exact_selection(massive: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 64, generator=generator)
    if massive:
        x[:, :2] *= 100
    W = torch.nn.functional.normalize(torch.randn(1024, 64, generator=generator), dim=1)
    zeros, bias = torch.zeros(1024), torch.zeros(64)
    exact = encode_topk(x, W, zeros, bias, 32)
    low = encode_topk(x, W, zeros, bias, 32, "bfloat16")
    same = (exact[1].sort().values == low[1].sort().values).all(dim=1).double().mean()
    assert same >= (0.90 if massive else 0.99)
    torch.testing.assert_close(low[0].sum(), exact[0].sum(), rtol=1e-4, atol=0)


def _bounds(
    precision: str, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor
) -> bounds.Bfloat16Bounds | bounds.Int8Bounds:
    if precision == "bfloat16":
        return bounds.Bfloat16Bounds(x, W, b)
    return bounds.Int8Bounds(bounds.Int8Encoder(W), x, b)


PRECISIONS = ["bfloat16", pytest.param("int8", marks=NEEDS_INT8)]


def _inputs_of(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n_latents = 20 if kind == "few latents" else 1024
    x, W = normal(500, 63), normal(n_latents, 63)
    b = torch.zeros(n_latents)
    if kind == "massive":
        x[:, :2] *= 100
    if kind == "offset":  # hidden behind a huge dimension, and the same in all vectors
        x = 0.3 * x + 1
        x[:, 0] += 300
        W += 0.3 * normal(n_latents, 1)
        W[:, 0] *= 0.01
    W = torch.nn.functional.normalize(W, dim=1)
    if kind == "alike":  # 200 latents per direction
        W = W[torch.arange(n_latents) % 5] + 1e-4 * W
    if kind in ("bias", "huge bias", "lengths"):
        b = normal(n_latents)
    if kind == "huge bias":
        b[3] = 1e9
    if kind == "lengths":
        W *= torch.logspace(-3, 1, n_latents)[:, None]
        x *= torch.logspace(-9, 3, len(x))[:, None]
        x[7] = 0
    if kind == "one long":
        x = torch.rand(500, n_latents, generator=generator).topk(8).values @ W[:8]
        x[0] *= 3e5
    if kind == "tiny":
        W *= 1e-36
    if kind == "not finite":
        x[::7] = math.nan
    if kind == "rounded twice":  # the product half a place down, then its sum with the bias
        x, W, b = (
            torch.ones(500, 1024),
            torch.full((1024, 1024), 2**-6),
            torch.full((1024,), -8.0625),
        )
        b[:16] = -7.985  # scores of 8.015
        W[700, :63] += 2**-10  # exact in bfloat16
        b[700] = -8.0315  # 8.03, which is 7.9375 in bfloat16
    return x, W, b


@pytest.mark.parametrize(
    ("kind", "pays"),
    [
        ("even", True),
        ("bias", True),
        ("rounded twice", None),
        ("massive", None),
        ("offset", None),
        ("alike", False),
        ("few latents", False),
        ("huge bias", False),
        ("lengths", None),
        ("one long", None),
        ("tiny", False),
        ("not finite", None),
    ],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_selection_with_bounds_is_exact(
    precision: str, kind: str, pays: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = _inputs_of(kind)
    monkeypatch.setitem(selection.TILE_ELEMENTS, "cpu", 100 * len(W))  # five tiles
    made = _bounds(precision, x, W, b)
    values, latents, candidates = bounds.select_surely(x, W, b, 16, made)
    exact = selection.select_topk(x, W, b, 16)
    finite = x.isfinite().all(dim=1)
    assert torch.equal(latents[finite], exact[1][finite])
    torch.testing.assert_close(values[finite], exact[0][finite])
    if pays is not None:
        assert (candidates < len(W)) == pays
    if kind == "alike":  # otherwise the test would prove nothing
        assert not torch.equal(selection.select_topk(x, W, b, 16, "bfloat16")[1], exact[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_selection_with_bounds_takes_the_first_of_equal_scores(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, W = (torch.randn(n, 64, generator=generator) for n in (300, 1024))
    W[512:] = W[:512].flip(0)  # each latent has a duplicate
    b = torch.zeros(1024)
    latents = bounds.select_surely(x, W, b, 15, _bounds(precision, x, W, b))[1]
    assert torch.equal(latents, selection.select_topk(x, W, b, 15)[1])
    assert ((latents < 512).sum(dim=1) == 8).all()


@NEEDS_INT8
def test_bounds_in_int8_hold_and_are_tight() -> None:
    generator = torch.Generator().manual_seed(1)
    x, W = (torch.randn(n, 256, generator=generator) for n in (200, 2048))
    W *= torch.rand(2048, 1, generator=generator) + 0.2
    x *= torch.rand(200, 1, generator=generator) + 0.2
    b = 5 * torch.randn(2048, generator=generator)
    copy = bounds.Int8Encoder((W / 3).requires_grad_())
    for first in range(0, 2048, 500):  # as training copies rows that have changed
        copy.refresh(W[first : first + 500], first)
    truth = x.double() @ W.double().T + b.double()
    for of in (copy, bounds.Int8Encoder(W)):
        n, rows = 512, slice(50, 200)
        chosen, most = bounds.Int8Bounds(of, x, b).candidates(rows, n, None)
        assert (truth[rows].gather(1, chosen) <= most).all()
        passed = most.amin(dim=1)
        rest = truth[rows].scatter(1, chosen, -math.inf).amax(dim=1)
        assert (rest <= passed).all()
        ranked = truth[rows].sort(dim=1, descending=True).values
        assert (passed - ranked[:, n]).abs().max() < 0.5 * truth.std()


def test_a_device_that_only_emulates_bfloat16_does_not_count_as_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not bounds.fast_bfloat16(torch.device("cuda"))


def test_gradients_have_the_same_bits_each_time_on_two_threads() -> None:
    generator = torch.Generator().manual_seed(2)
    x, W_enc, W_dec = (torch.randn(n, 96, generator=generator) for n in (3000, 700, 700))
    inputs = [x, W_enc, torch.zeros(700), W_dec, torch.zeros(96)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [
            _gradients(encode_topk, decode_topk, [each.requires_grad_() for each in inputs])
            for _ in range(3)
        ]
    finally:
        torch.set_num_threads(before)
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second) and torch.equal(second, third)
