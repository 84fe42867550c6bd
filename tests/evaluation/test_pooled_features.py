from __future__ import annotations

import pytest
import torch

from sparsight.evaluation.data import Layout
from sparsight.evaluation.pooling import PooledFeatures, heat
from sparsight.sae import SparseCode

LAYOUT = Layout(n_tokens=5, n_prefix=1, has_cls=True, grid=(2, 2))


@pytest.fixture(scope="module")
def dense():
    """Features [images, tokens, n], mostly 0."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(23, 5, 30, generator=g)
    return x * (torch.rand(x.shape, generator=g) < 0.1)


def sparse(x):
    rows = x.flatten(0, 1)
    return SparseCode.from_padded(rows, torch.arange(rows.shape[1]).expand_as(rows), rows.shape[1])


@pytest.mark.parametrize("batch", [1, 6, 23])
@pytest.mark.parametrize("layout", [LAYOUT, Layout(5, None, False, None)])
def test_sparse_pooling_equals_pooling_the_dense_features(dense, batch, layout):
    pooled = PooledFeatures(layout, limit=1000)
    for part in dense.split(batch):
        pooled.add(sparse(part))
    patches = dense[:, layout.n_prefix or 0 :]
    torch.testing.assert_close(pooled.columns("max", slice(0, 30)), patches.amax(dim=1))
    torch.testing.assert_close(pooled.columns("mean", slice(7, 19)), patches.mean(dim=1)[:, 7:19])
    some = torch.tensor([29, 3, 3, 0])
    torch.testing.assert_close(pooled.columns("mean", some), patches.mean(dim=1)[:, some])
    assert pooled.n_scenes == 23 and not pooled.signed


def test_features_of_either_sign_are_pooled_with_both(dense):
    signed = dense - 0.05
    pooled = PooledFeatures(LAYOUT, limit=1000)
    for part in signed.split(9):
        pooled.add(part.flatten(0, 1))
    patches, both = signed[:, 1:], torch.cat([signed, -signed], dim=2)[:, 1:]
    assert pooled.n_features == 60
    torch.testing.assert_close(pooled.columns("max", slice(0, 60)), both.amax(dim=1))
    torch.testing.assert_close(pooled.columns("mean", slice(0, 60)), both.mean(dim=1))
    torch.testing.assert_close(pooled.columns("max", torch.tensor([31])), -patches.amin(1)[:, 1:2])


@pytest.mark.parametrize("kind", [sparse, lambda x: x.flatten(0, 1)])
def test_scenes_beyond_the_limit_are_left_out(dense, kind):
    whole, limited = PooledFeatures(LAYOUT, 1000), PooledFeatures(LAYOUT, 10)
    for part in dense.split(4):
        whole.add(kind(part))
        limited.add(kind(part))
    assert limited.n_scenes == 10
    torch.testing.assert_close(
        limited.columns("max", slice(0, 30)), whole.columns("max", slice(0, 30))[:10]
    )


def test_heat_of_sparse_features_equals_that_of_dense_ones(dense):
    chosen = torch.tensor([4, 17, 29])
    expected = dense[:, 1:, chosen]
    torch.testing.assert_close(heat(sparse(dense), LAYOUT, chosen), expected)
    torch.testing.assert_close(heat(dense.flatten(0, 1), LAYOUT, chosen), expected)
    torch.testing.assert_close(heat(dense.flatten(0, 1), LAYOUT, chosen + 30), -expected)


def test_features_that_never_fire_are_0_everywhere():
    pooled = PooledFeatures(LAYOUT, 1000)
    pooled.add(sparse(torch.zeros(6, 5, 8)))
    assert torch.equal(pooled.columns("max", slice(0, 8)), torch.zeros(6, 8))


def test_heat_of_no_features_is_empty(dense):
    none = torch.tensor([], dtype=torch.int64)
    for features in (sparse(dense), dense.flatten(0, 1)):
        assert heat(features, LAYOUT, none).shape == (23, 4, 0)
