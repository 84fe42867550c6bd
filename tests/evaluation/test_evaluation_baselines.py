from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation_parts import make_sae
from sparsight.errors import UserError
from sparsight.evaluation import PCA, Moments, Neurons, untrained
from sparsight.sae import (
    Gated,
    JumpReLU,
    Normaliser,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)


@pytest.fixture(scope="module")
def x():
    g = torch.Generator().manual_seed(0)
    return torch.randn(200, 12, generator=g) @ torch.randn(12, 12, generator=g) + 50


def moments_of(x, batch=64):
    moments = Moments(x.shape[1])
    for part in x.split(batch):
        moments.add(part)
    return moments


@pytest.mark.parametrize("batch", [1, 33, 200])
def test_streaming_moments_equal_those_of_the_whole(x, batch):
    moments, whole = moments_of(x, batch), x.double().numpy()
    np.testing.assert_allclose(moments.mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(whole.T, bias=True), rtol=1e-9)


def test_a_huge_mean_does_not_swallow_the_covariance(x):
    far = x.double() + 1e8
    np.testing.assert_allclose(
        moments_of(far).covariance, np.cov(x.double().numpy().T, bias=True), rtol=1e-5
    )


def test_pca_equals_that_of_scikit_learn(x):
    peer = pytest.importorskip("sklearn.decomposition").PCA(5).fit(x.double().numpy())
    pca = PCA.fit(moments_of(x), 5)
    x_hat, features = pca(x)
    expected = peer.inverse_transform(peer.transform(x.double().numpy()))
    np.testing.assert_allclose(x_hat, expected, atol=2e-4)
    np.testing.assert_allclose(
        features[:, :5].abs(), np.abs(peer.transform(x.double().numpy())), atol=2e-4
    )
    assert pca.fvu_of(5) == pytest.approx(1 - peer.explained_variance_ratio_.sum(), rel=1e-6)


def test_pca_error_is_the_remaining_variance_and_0_with_all_components(x):
    pca = PCA.fit(moments_of(x), 4)
    error = (pca(x)[0] - x).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert float(error) == pytest.approx(pca.fvu_of(4), rel=1e-4)
    assert pca.components_for(pca.fvu_of(4)) == 4
    assert pca.components_for(pca.fvu_of(4) - 1e-9) == 5
    torch.testing.assert_close(PCA.fit(moments_of(x), 12)(x)[0], x, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="k is 13"):
        PCA.fit(moments_of(x), 13)


def test_neurons_keep_the_dimensions_furthest_from_their_mean(x):
    mean = x.mean(dim=0)
    x_hat, features = Neurons(mean, 3)(x)
    torch.testing.assert_close(features, x - mean)
    for row, kept in zip(x - mean, x_hat - mean, strict=True):
        chosen = row.abs().argsort(descending=True)[:3]
        expected = torch.zeros(12)
        expected[chosen] = row[chosen]
        torch.testing.assert_close(kept, expected, atol=2e-5, rtol=0)


def test_an_untrained_sae_has_the_shape_and_normaliser_but_not_the_weights(x):
    normaliser = Normaliser(x.mean(dim=0), x.std()[None])
    sae = make_sae(12, 30, normaliser=normaliser)
    before = sae.W_enc.clone()
    fresh = untrained(sae, x, seed=7, k=4)
    assert fresh.config == sae.config and fresh.W_enc.shape == sae.W_enc.shape
    torch.testing.assert_close(fresh.normaliser.mean, normaliser.mean)
    assert not torch.equal(fresh.W_dec, sae.W_dec)
    assert torch.equal(fresh.W_dec, untrained(sae, x, seed=7, k=4).W_dec)
    assert torch.equal(sae.W_enc, before)
    # Its encoder is scaled to these activations: reconstructions have their norm.
    z_hat = normaliser(fresh(x).x_hat)
    ratio = z_hat.square().sum() / normaliser(x).square().sum()
    assert float(ratio) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("sparsity", [ReLU(), JumpReLU(), Gated()])
def test_an_untrained_sae_with_learnt_sparsity_uses_as_many_latents_as_the_trained_one(
    sparsity: ReLU | JumpReLU | Gated,
) -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder(8, SAEConfig(32, sparsity=sparsity))
    assert untrained(sae, x, seed=0, k=5).config.sparsity == TopK(5)
