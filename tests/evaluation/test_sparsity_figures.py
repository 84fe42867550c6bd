from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from evaluation_parts import make_sae
from sparsight.errors import UserError
from sparsight.evaluation import SparsityMeter
from sparsight.evaluation.sparsity import LatentCounts, low_density_cluster, mean_pairwise_cosine
from sparsight.sae import SparseCode

N_LATENTS, N_TOKENS = 40, 5


def code_of(dense):
    return SparseCode.from_padded(
        dense, torch.arange(dense.shape[1]).expand_as(dense), dense.shape[1]
    )


@pytest.fixture(scope="module")
def dense():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(30 * N_TOKENS, N_LATENTS, generator=g)
    x *= torch.rand(x.shape, generator=g) < torch.linspace(0, 0.5, N_LATENTS)
    return x


def meter_of(dense, batch=10):
    meter = SparsityMeter(N_LATENTS, N_TOKENS)
    for part in dense.split(batch * N_TOKENS):
        meter.add(code_of(part))
    return meter


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_counts_equal_those_of_the_dense_matrix(dense, batch):
    counts, x = meter_of(dense, batch).counts(), dense.double().numpy()
    np.testing.assert_array_equal(counts.n_active, (x > 0).sum(0))
    np.testing.assert_allclose(counts.density, (x > 0).mean(0), rtol=1e-12)
    alive = counts.n_active > 0
    expected = x.sum(0)[alive] / (x > 0).sum(0)[alive]
    np.testing.assert_allclose(counts.mean_activation[alive], expected, rtol=1e-12)
    assert np.isnan(counts.mean_activation[~alive]).all() and (~alive).any()


def test_cls_and_patches_have_separate_l0s(dense):
    found = meter_of(dense).result(n_prefix=1, has_cls=True, window=None)
    by_position = (dense > 0).sum(dim=1).view(-1, N_TOKENS).double()
    assert found["l0"] == pytest.approx(by_position.mean().item())
    assert found["l0_cls"] == pytest.approx(by_position[:, 0].mean().item())
    assert found["l0_patches"] == pytest.approx(by_position[:, 1:].mean().item())
    assert "l0_cls" not in meter_of(dense).result(n_prefix=0, has_cls=False, window=None)


@pytest.mark.parametrize("window", [1, 12, 149, 150, 10**9])
def test_dead_counts_the_latents_that_were_silent_in_the_last_n_vectors(dense, window):
    found = meter_of(dense).result(1, True, window)
    silent = ~(dense[-window:] > 0).any(dim=0)
    assert found["dead"] == silent.double().mean().item()
    assert found["dead_window"] == min(window, len(dense))
    assert found["clipscope_dead"] == (~(dense > 0).any(dim=0)).double().mean().item()
    assert found["clipscope_dead_window"] == len(dense)


def test_a_selected_latent_with_value_0_does_not_count_as_active():
    sae = make_sae(d_in=6, n_latents=10, k=3)
    sae.b_enc.fill_(-100)
    meter = SparsityMeter(10, 1)
    meter.add(sae.encode(torch.randn(8, 6)))
    found = meter.result(None, False, None)
    assert (found["l0"], found["dead"], found["density"]["never"]) == (0, 1, 10)


def test_the_density_histogram_counts_every_latent_that_ever_fires(dense):
    meter = meter_of(dense)
    density = meter.result(1, True, None)["density"]
    assert sum(density["histogram"]) + density["never"] == N_LATENTS
    logs = np.log10(meter.counts().density[meter.counts().density > 0])
    expected, _ = np.histogram(logs, density["log10_edges"])
    assert density["histogram"] == expected.tolist()
    assert density["below_1e-5"] == density["never"] / N_LATENTS


def test_mean_cosine_over_pairs_equals_that_of_all_pairs():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    pairs = [float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(9), 2)]
    assert mean_pairwise_cosine(rows) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert mean_pairwise_cosine(rows[:1]) is None


def test_a_cluster_of_rare_latents_with_one_direction_is_found():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 64, generator=g)
    rows[:10] = torch.ones(64) + 0.1 * torch.randn(10, 64, generator=g)
    density = np.full(50, 1e-3)
    density[:10] = 2e-6
    found = low_density_cluster(
        LatentCounts(density, density, (density * 1e6).astype(np.int64)), rows
    )
    assert found["n"] == 10 and found["mean_cosine"] > 0.9
    assert abs(found["mean_cosine_others"]) < 0.1


def test_vectors_of_partial_images_are_refused(dense):
    with pytest.raises(UserError, match="whole images"):
        SparsityMeter(N_LATENTS, N_TOKENS).add(code_of(dense[:7]))
    with pytest.raises(UserError, match="no vectors to measure"):
        SparsityMeter(N_LATENTS, N_TOKENS).result(1, True, None)
