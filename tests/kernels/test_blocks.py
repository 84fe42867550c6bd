from __future__ import annotations

import pytest
import torch
from step_parts import use_variant

from sparsight.kernels.native import blocks, build


@pytest.mark.parametrize("variant", build.VARIANTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("n", "n_latents", "k", "d"),
    [(1, 1, 1, 1), (200, 300, 40, 70), (95, 97, 97, 64), (2100, 12, 5, 129)],
)
def test_sums_and_products_in_blocks_match_the_dense_matrix(
    n: int,
    n_latents: int,
    k: int,
    d: int,
    threads: int,
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_variant(variant, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(n, n_latents, generator=generator).topk(k, dim=1).indices
    values = torch.randn(n, k, generator=generator, dtype=torch.float64)
    latents = latents.sort(dim=1).values
    code = torch.zeros(n, n_latents, dtype=torch.float64)
    missing = torch.arange(k) >= torch.randint(0, k + 1, (n, 1), generator=generator)
    code.scatter_(1, latents, values.masked_fill(missing, 0))
    latents = latents.masked_fill(missing, -1).to(torch.int32)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    W = torch.randn(n_latents, d, generator=generator, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        by_vector = blocks.VectorsByLatents(latents, n_latents)
        by_latent = blocks.LatentsByVectors(latents, n_latents)
        decoded = by_vector.sums(values.flatten(), W, x.clone(), add=True)
        weights, sums = by_latent.ordered(values)
        gradients = by_latent.sums(weights, x, torch.full_like(W, 7.0))
        products = torch.full_like(values, 7.0)
        by_vector.products(x, W, values, products)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(decoded, x + code @ W, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, code.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, code.sum(dim=0), rtol=1e-12, atol=1e-12)
    dense = (x @ W.T).gather(1, latents.clamp(min=0).long()).where(values > 0, 0)
    expected = dense.masked_fill(missing, 7.0)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-12)
