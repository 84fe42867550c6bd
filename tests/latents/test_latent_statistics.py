from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.latents.examples import ExampleTable, lottery_rank, strength_rank
from sparsight.latents.statistics import LatentStatistics, label_mixture, quantile_samples
from sparsight.sae import SparseCode

N_LATENTS, N_IMAGES, N_TOKENS, TOP_N = 40, 90, 5, 6


def activations(seed: int, levels: int | None = None) -> Tensor:
    """Dense codes [images, tokens, latents]; latents differ in density, 0 to 3 never fire.

    With `levels`, there are only a few values, so that ties are everywhere.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (N_IMAGES, N_TOKENS, N_LATENTS)
    values = torch.rand(shape, generator=random) + 0.01
    if levels:
        values = (values * levels).ceil() / levels
    density = torch.linspace(0, 0.35, N_LATENTS).clamp(min=0) ** 2
    density[:4] = 0
    return values * (torch.rand(shape, generator=random) < density)


def as_code(dense: Tensor) -> SparseCode:
    """The code of [rows, latents], with the entries of a row in random order."""
    row, latent = dense.nonzero(as_tuple=True)
    shuffle = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    shuffle = shuffle[row[shuffle].argsort(stable=True)]
    row, latent = row[shuffle], latent[shuffle]
    offsets = torch.zeros(len(dense) + 1, dtype=torch.int64)
    offsets[1:] = row.bincount(minlength=len(dense)).cumsum(0)
    return SparseCode(latent, dense[row, latent], offsets, dense.shape[1])


def collect(dense: Tensor, batch: int, sample_size: int = 16, seed: int = 0) -> LatentStatistics:
    found = LatentStatistics(N_LATENTS, top_n=TOP_N, sample_size=sample_size, seed=seed)
    for start in range(0, len(dense), batch):
        part = dense[start : start + batch]
        images = torch.arange(start, start + len(part))
        found.add(as_code(part.flatten(0, 1)), images, N_TOKENS)
    return found


def strongest_by_hand(dense: Tensor, latent: int) -> list[tuple[int, int, float]]:
    """(image, token, activation), strongest first, ties by image, then by token."""
    per_image = []
    for image, tokens in enumerate(dense[:, :, latent].tolist()):
        peak = max(tokens)
        if peak > 0:
            per_image.append((image, tokens.index(peak), peak))
    return sorted(per_image, key=lambda example: (-example[2], example[0]))


def examples(table: ExampleTable, latent: int) -> list[tuple[int, int, float]]:
    columns = (table.image[latent], table.token[latent], table.activation[latent])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [row for row in rows if row[0] >= 0]


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("batch", [1, 7, 90])
def test_statistics_and_strongest_images_equal_brute_force(levels: int | None, batch: int) -> None:
    dense = activations(1, levels)
    found = collect(dense, batch)
    flat = dense.flatten(0, 1).double()
    assert found.n_vectors == N_IMAGES * N_TOKENS
    assert found.n_images == N_IMAGES
    assert torch.equal(found.n_active, (flat > 0).sum(0))
    assert torch.equal(found.n_active_images, (dense > 0).any(1).sum(0))
    torch.testing.assert_close(found.sum, flat.sum(0), rtol=1e-13, atol=0)
    for latent in range(N_LATENTS):
        expected = strongest_by_hand(dense, latent)[:TOP_N]
        assert examples(found.top, latent) == expected


def test_latents_that_never_fire_have_no_examples_and_rare_ones_fewer_than_n() -> None:
    found = collect(activations(1), 7)
    n_examples = (found.top.image >= 0).sum(1)
    assert not n_examples[:4].any()
    assert (found.top.token[:4] == -1).all()
    assert (found.top.activation[:4] == 0).all()
    assert ((n_examples > 0) & (n_examples < TOP_N)).any()
    assert torch.equal(n_examples, found.n_active_images.clamp(max=TOP_N))


@pytest.mark.parametrize("levels", [None, 2])
def test_batches_change_nothing(levels: int | None) -> None:
    dense = activations(2, levels)
    one, other = collect(dense, 3), collect(dense, 41)
    for name in ("top", "sample"):
        for part in ("rank", "image", "token", "activation"):
            assert torch.equal(
                getattr(getattr(one, name), part), getattr(getattr(other, name), part)
            ), f"{name}.{part}"


def test_the_sample_holds_every_active_image_that_fits() -> None:
    dense = activations(3)
    found = collect(dense, 10, sample_size=N_IMAGES)
    for latent in range(N_LATENTS):
        assert sorted(examples(found.sample, latent)) == sorted(strongest_by_hand(dense, latent))


def test_the_sample_is_fair_and_differs_between_seeds_and_latents() -> None:
    n_latents, n_images, kept = 200, 50, 5
    latent = torch.arange(n_latents).repeat_interleave(n_images)
    image = torch.arange(n_images).repeat(n_latents)
    chosen = []
    for seed in range(20):
        table = ExampleTable(n_latents, kept)
        ones = torch.ones(len(latent))
        table.offer(latent, lottery_rank(latent, image, seed), image, image, ones)
        chosen.append(table.image)
    drawn = torch.stack([table.flatten().bincount(minlength=n_images) for table in chosen]).double()
    expected = n_latents * kept / n_images
    variance = expected * (1 - kept / n_images)
    # χ² over its degrees of freedom: mean 1, and over 20 seeds a standard deviation of 0.045.
    statistic = (drawn - expected).square().sum(dim=1) / variance / n_images
    assert abs(float(statistic.mean()) - 1) < 4 * 0.045
    assert not torch.equal(chosen[0], chosen[1])
    assert len(chosen[0].sort(1).values.unique(dim=0)) > 0.95 * n_latents


def test_quantile_samples_lie_in_their_quarter_of_the_active_images() -> None:
    dense = activations(4)
    found = collect(dense, 10, sample_size=N_IMAGES)
    bands = quantile_samples(found.sample, quantiles=4, per_quantile=2)
    for latent in range(N_LATENTS):
        ordered = strongest_by_hand(dense, latent)
        place = {image: i for i, (image, _, _) in enumerate(ordered)}
        value = {image: (token, activation) for image, token, activation in ordered}
        seen: list[int] = []
        for band in range(4):
            images = bands.image[latent, band].tolist()
            for slot, image in enumerate(images):
                if image < 0:
                    assert bands.activation[latent, band, slot] == 0
                    continue
                low = math.ceil(band * len(ordered) / 4)
                high = math.ceil((band + 1) * len(ordered) / 4)
                assert low <= place[image] < high
                token, activation = value[image]
                assert bands.token[latent, band, slot] == token
                assert bands.activation[latent, band, slot].item() == activation
                seen.append(image)
            here = [image for image in images if image >= 0]
            wide = math.ceil((band + 1) * len(ordered) / 4) - math.ceil(band * len(ordered) / 4)
            assert len(here) == min(2, wide)
        assert len(seen) == len(set(seen))


def test_ranks_by_strength_are_in_the_order_of_the_numbers() -> None:
    values = torch.tensor([1e-30, 3.4e38, 1.0, 1.0000001, 0.5, 65504.0, 1e-45])
    by_rank = values[strength_rank(values).argsort()]
    assert torch.equal(by_rank, values.sort(descending=True).values)


def test_an_activation_that_is_not_finite_names_the_images() -> None:
    dense = activations(5)
    dense[3, 0, 9] = math.nan
    code = as_code(dense.flatten(0, 1))
    found = LatentStatistics(N_LATENTS, top_n=2, sample_size=2)
    with pytest.raises(SparsightError, match="NaN or infinite in images 0 to 89"):
        found.add(code, torch.arange(N_IMAGES), N_TOKENS)


def test_label_entropy_follows_the_formula() -> None:
    labels = {i: "abc"[i % 3] for i in range(12)}
    weights = [float(12 - i) for i in range(12)]
    mixture = label_mixture(range(12), weights, labels)
    share = np.array([sum(weights[i::3]) for i in range(3)]) / sum(weights)
    assert mixture.entropy == pytest.approx(float(-(share * np.log(share)).sum()), rel=1e-12)
    assert mixture.label == "a"
    assert mixture.share == pytest.approx(share[0])


def test_one_label_has_entropy_zero_and_equal_shares_have_the_logarithm() -> None:
    assert label_mixture(range(10), [0.1] * 10, dict.fromkeys(range(10), "x")).entropy == 0
    each = label_mixture(range(16), [2.0] * 16, {i: str(i) for i in range(16)})
    assert each.entropy == pytest.approx(math.log(16))


def test_label_entropy_needs_ten_labelled_images() -> None:
    labels: dict[int, str | None] = dict.fromkeys(range(9), "x")
    images = [*range(9), 9, -1]
    mixture = label_mixture(images, [1.0] * 10 + [0.0], {**labels, 9: None})
    assert mixture.entropy is None
    assert (mixture.label, mixture.share) == ("x", 1.0)
    assert label_mixture([9], [1.0], {9: None}).label is None


def test_ranks_follow_activations_of_either_sign() -> None:
    values = torch.tensor([0.5, -0.25, 3.0, -7.0, 1e-30, -1e-30, 65504.0])
    assert torch.equal(values[strength_rank(values).argsort()], values.sort(descending=True).values)
    assert int(strength_rank(values).min()) >= 0 and int(strength_rank(values).max()) < 1 << 32
