from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.latents import Postings
from sparsight.naming.image_space import ImageSpace
from sparsight.naming.scores import LatentActivations
from sparsight.naming.splicing import Splice, splice
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK


def unit_rows(n: int, d: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=random, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("penalty", [0.05, 0.2])
def test_weights_equal_scikit_learns_lasso(penalty: float) -> None:
    d, words, x = 24, unit_rows(300, 24, 0), unit_rows(7, 24, 1)
    places, weights = splice(x, words, penalty=penalty, n_words=60)
    for row in range(len(x)):
        lasso = Lasso(penalty / d, positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)
        expected = lasso.fit(words.T.numpy(), x[row].numpy()).coef_
        found = np.zeros(len(words))
        there = places[row] >= 0
        found[places[row][there].numpy()] = weights[row][there].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert torch.equal(weights[row], weights[row].sort(descending=True).values)


def test_a_planted_mixture_is_found() -> None:
    words = unit_rows(2_000, 128, 2)
    mixture = normalize((3 * words[[5]] + 2 * words[[70]] + words[[1999]]), dim=1)
    places, weights = splice(mixture, words, penalty=0.05, n_words=5)
    assert places[0, :3].tolist() == [5, 70, 1999]
    assert float(weights[0, 3:].sum()) < 0.05 * float(weights[0].sum())


def test_nothing_fits_a_row_far_from_all_words() -> None:
    words = unit_rows(10, 16, 3).abs()
    places, weights = splice(-words[:2], words)
    assert (places == -1).all() and not weights.any()
    assert splice(words[:0], words)[0].shape == (0, 32)
    with pytest.raises(ValueError, match="positive"):
        splice(words, words, penalty=0)


def test_latents_get_the_words_of_their_images() -> None:
    d, n_images, n_words = 32, 200, 50
    words = unit_rows(n_words, d, 4).float()
    random = np.random.default_rng(0)
    of_image = random.integers(0, n_words, n_images)
    noise = 0.02 * torch.randn(n_images, d, generator=torch.Generator().manual_seed(5))
    matrix = normalize(words[of_image] + noise, dim=1).half()
    space = ImageSpace(matrix, np.arange(n_images), n_images)
    columns = [np.flatnonzero(of_image == word) for word in (3, 17, 40)]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in columns])])
    rows = Postings(
        offsets.astype(np.int64),
        np.concatenate(columns).astype(np.int32),
        np.ones(int(offsets[-1]), dtype=np.float32),
        None,
        n_images,
    )
    sae = SparseAutoencoder(8, SAEConfig(n_latents=3, sparsity=TopK(k=1)), seed=0)
    names = [f"word {i}" for i in range(n_words)]
    found = Splice(space, names, words).candidates(LatentActivations(sae, np.arange(3), rows))
    assert found.word[:, 0].tolist() == [3, 17, 40]
    assert (found.score[:, :-1] >= found.score[:, 1:]).all()
