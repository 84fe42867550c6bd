from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.latents import postings as postings_module
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.examples import Examples, lottery_rank, strength_rank
from sparsight.latents.postings import Postings, PostingSpool
from sparsight.latents.spatial import SpatialStatistics
from sparsight.latents.statistics import LatentStatistics, label_mixture
from sparsight.latents.summary import Summary, latent_table, summarise
from sparsight.sae import SparseCode

N_LATENTS, N_IMAGES, N_TOKENS, TOP_N = 40, 90, 5, 6
LABELS = [None if i % 7 == 0 else "abc"[i % 3] for i in range(N_IMAGES)]


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


class Pass:
    """One pass over dense codes, as `build_index` makes it."""

    def __init__(
        self, dense: Tensor, folder: Path, batch: int, places: Tensor | None = None, **more: int
    ) -> None:
        folder.mkdir()
        spool = PostingSpool(folder)
        self.statistics = LatentStatistics(N_LATENTS, spool, n_prefix=1, grid=(2, 2))
        places = torch.arange(len(dense)) if places is None else places
        for part, images in zip(dense.split(batch), places.split(batch), strict=True):
            self.statistics.add(CodeBatch(images, as_code(part.flatten(0, 1)), N_TOKENS))
        n_places = int(places.max()) + 3
        spool.write(folder / "image", folder / "latent", n_places, N_LATENTS)
        assert sorted(path.name for path in folder.iterdir()) == ["image", "latent"]
        self.by_latent, self.by_image = (
            Postings.open(folder / name, *shape, spool.n_entries, tokens=name == "latent", again="")
            for name, shape in (
                ("latent", (N_LATENTS, n_places)),
                ("image", (n_places, N_LATENTS)),
            )
        )
        settings = {"top_n": TOP_N, "quantiles": 4, "samples_per_quantile": 2}
        settings |= {"uniform_samples": 5, "seed": 0} | more
        self.images = pa.table({"image": places.numpy(), "label": LABELS})
        self.summary: Summary = summarise(self.by_latent, self.images, settings)
        self.table = latent_table(self.statistics, self.summary, self.images).to_pylist()


def strongest_by_hand(dense: Tensor, latent: int) -> list[tuple[int, int, float]]:
    """(image, token, activation), strongest first, ties by image, then by token."""
    per_image = []
    for image, tokens in enumerate(dense[:, :, latent].tolist()):
        peak = max(tokens)
        if peak > 0:
            per_image.append((image, tokens.index(peak), peak))
    return sorted(per_image, key=lambda example: (-example[2], example[0]))


def rows(table: Examples, *place: int) -> list[tuple[int, int, float]]:
    columns = (table.image[place], table.token[place], table.activation[place])
    found = zip(*(column.tolist() for column in columns), strict=True)
    return [row for row in found if row[0] >= 0]


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("batch", [1, 7, 90])
def test_statistics_and_strongest_images_equal_brute_force(
    levels: int | None, batch: int, tmp_path: Path
) -> None:
    dense = activations(1, levels)
    found = Pass(dense, tmp_path / "x", batch)
    flat = dense.flatten(0, 1).double()
    statistics = found.statistics
    assert statistics.n_vectors == N_IMAGES * N_TOKENS
    assert statistics.n_images == N_IMAGES
    assert torch.equal(statistics.n_active, (flat > 0).sum(0))
    assert torch.equal(statistics.n_active_prefix, (dense[:, 0] > 0).sum(0))
    assert torch.equal(statistics.n_active_images, (dense > 0).any(1).sum(0))
    torch.testing.assert_close(statistics.sum, flat.sum(0), rtol=1e-13, atol=0)
    for latent in range(N_LATENTS):
        expected = strongest_by_hand(dense, latent)
        assert rows(found.summary.examples.top, latent) == expected[:TOP_N]
        places, values = found.by_latent.row(latent)
        assert list(zip(places.tolist(), values.tolist(), strict=True)) == [
            (image, value) for image, _, value in sorted(expected)
        ]
        counted = dict(found.summary.labels.table.to_pandas().values)
        assert counted == {label: LABELS.count(label) for label in "abc"}


def test_lists_by_image_hold_what_fires_in_it(tmp_path: Path) -> None:
    dense = activations(1)
    places = torch.arange(N_IMAGES) * 2 + 5  # the others could not be read
    found = Pass(dense, tmp_path / "x", 7, places).by_image
    peaks = dense.amax(1)
    for row, place in enumerate(places.tolist()):
        latents, values = found.row(place)
        assert latents.tolist() == peaks[row].nonzero().flatten().tolist()
        assert values.tolist() == peaks[row][peaks[row] > 0].tolist()
        assert len(found.row(place - 1)[0]) == 0


def test_small_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = activations(1)
    whole = Pass(dense, tmp_path / "whole", 10)
    monkeypatch.setattr(postings_module, "ENTRIES_AT_ONCE", 50)
    assert len(list(postings_module.row_blocks(whole.by_latent.offsets, 50))) > 10
    parts = Pass(dense, tmp_path / "parts", 10)
    for name in ("image", "latent"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert parts.table == whole.table


def test_latents_that_never_fire_have_no_examples_and_rare_ones_fewer_than_n(
    tmp_path: Path,
) -> None:
    found = Pass(activations(1), tmp_path / "x", 7)
    top = found.summary.examples.top
    n_examples = (top.image >= 0).sum(1)
    assert not n_examples[:4].any()
    assert (top.token[:4] == -1).all()
    assert (top.activation[:4] == 0).all()
    assert ((n_examples > 0) & (n_examples < TOP_N)).any()
    assert torch.equal(n_examples, found.statistics.n_active_images.clamp(max=TOP_N))
    for column in ("q50", "moran", "cls_share", "mean_activation", "top_label"):
        assert found.table[2][column] is None
    assert found.table[2]["histogram"] == [0] * 20


def test_distributions_equal_brute_force(tmp_path: Path) -> None:
    dense = activations(3)
    found = Pass(dense, tmp_path / "x", 10)
    for latent in range(4, N_LATENTS):
        row = found.table[latent]
        peaks = np.array(sorted(value for _, _, value in strongest_by_hand(dense, latent)))
        if not len(peaks):
            continue
        for name, share in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            assert row[name] == np.quantile(peaks, share, method="inverted_cdf")
        expected, _ = np.histogram(peaks, bins=20, range=(0, peaks[-1]))
        assert row["histogram"] == expected.tolist()
        assert (row["histogram_low"], row["histogram_high"]) == (0, peaks[-1])


def test_labels_are_counted_over_all_images(tmp_path: Path) -> None:
    dense = activations(3)
    found = Pass(dense, tmp_path / "x", 10)
    n_entries = found.summary.labels.write(tmp_path / "labels")
    from sparsight.latents.label_counts import LabelCounts

    labels = found.summary.labels.table
    counts = LabelCounts.open(tmp_path / "labels", labels, N_LATENTS, n_entries, "")
    for latent in range(N_LATENTS):
        fires = [LABELS[image] for image, _, _ in strongest_by_hand(dense, latent)]
        expected = {label: fires.count(label) for label in "abc" if label in fires}
        assert counts.of(latent) == expected
        assert list(counts.of(latent).values()) == sorted(expected.values(), reverse=True)


def test_the_uniform_sample_holds_every_image_that_fits(tmp_path: Path) -> None:
    dense = activations(3)
    found = Pass(dense, tmp_path / "x", 10, uniform_samples=N_IMAGES)
    for latent in range(N_LATENTS):
        assert rows(found.summary.examples.uniform, latent) == strongest_by_hand(dense, latent)


def test_the_sample_is_fair_and_differs_between_seeds_and_latents(tmp_path: Path) -> None:
    dense = torch.rand(N_IMAGES, N_TOKENS, N_LATENTS, generator=torch.Generator().manual_seed(0))
    kept = 5
    chosen = [
        Pass(dense, tmp_path / str(seed), 90, seed=seed).summary.examples.uniform.image
        for seed in range(20)
    ]
    drawn = torch.stack([table.flatten().bincount(minlength=N_IMAGES) for table in chosen]).double()
    expected = N_LATENTS * kept / N_IMAGES
    variance = expected * (1 - kept / N_IMAGES)
    # χ² over its degrees of freedom: mean 1, and over 20 seeds a standard deviation of 0.034.
    statistic = (drawn - expected).square().sum(dim=1) / variance / N_IMAGES
    assert abs(float(statistic.mean()) - 1) < 4 * 0.034
    assert not torch.equal(chosen[0], chosen[1])
    assert len(chosen[0].sort(1).values.unique(dim=0)) > 0.95 * N_LATENTS


@pytest.mark.parametrize("levels", [None, 2])
def test_samples_of_bands_lie_in_their_quarter_of_the_active_images(
    levels: int | None, tmp_path: Path
) -> None:
    dense = activations(4, levels)
    bands = Pass(dense, tmp_path / "x", 10).summary.examples.bands
    for latent in range(N_LATENTS):
        ordered = strongest_by_hand(dense, latent)
        seen = []
        for band in range(4):
            low, high = (math.ceil(edge * len(ordered) / 4) for edge in (band, band + 1))
            here = rows(bands, latent, band)
            assert set(here) <= set(ordered[low:high])
            assert len(here) == min(2, high - low)
            assert here == [row for row in ordered if row in here]
            seen += here
        assert len(seen) == len(set(seen))


def test_morans_i_equals_the_double_sum(tmp_path: Path) -> None:
    rows_, columns, n_latents = 4, 5, 3
    random = torch.Generator().manual_seed(0)
    x = torch.rand(6, n_latents, rows_, columns, generator=random).double()
    x = x * (torch.rand(x.shape, generator=random) < 0.4)
    x[:, 2] = 0
    x[0, 2, :, :2] = 1.0  # one compact area
    x[1, 2] = 0.5  # everywhere: left out
    spatial = SpatialStatistics(n_latents, (rows_, columns))
    entry = x.flatten(2).permute(0, 1, 2).reshape(-1)
    at = entry.nonzero().flatten()
    pair = at // (rows_ * columns)
    spatial.add(torch.arange(n_latents).repeat(6), pair, at % (rows_ * columns), entry[at])
    expected: list[list[float]] = [[] for _ in range(n_latents)]
    place = [(r, c) for r in range(rows_) for c in range(columns)]
    near = torch.tensor(
        [
            [float(p != q and max(abs(p[0] - q[0]), abs(p[1] - q[1])) == 1) for q in place]
            for p in place
        ]
    ).double()
    for image in x.flatten(2):
        for latent, values in enumerate(image):
            z = values - values.mean()
            if z.square().sum() > 1e-12:
                moran = len(place) / near.sum() * (z @ near @ z) / z.square().sum()
                expected[latent].append(float(moran))
    assert spatial.count.tolist() == [len(values) for values in expected]
    for latent, values in enumerate(expected):
        assert float(spatial.total[latent]) == pytest.approx(sum(values))
    assert expected[2][0] > 0.5
    assert spatial.null == -1 / 19


def test_ranks_by_strength_are_in_the_order_of_the_numbers() -> None:
    values = torch.tensor([1e-30, 3.4e38, 1.0, 1.0000001, 0.5, 65504.0, 1e-45])
    by_rank = values[strength_rank(values).argsort()]
    assert torch.equal(by_rank, values.sort(descending=True).values)


def test_ranks_follow_activations_of_either_sign() -> None:
    values = torch.tensor([0.5, -0.25, 3.0, -7.0, 1e-30, -1e-30, 65504.0])
    assert torch.equal(values[strength_rank(values).argsort()], values.sort(descending=True).values)
    assert int(strength_rank(values).min()) >= 0 and int(strength_rank(values).max()) < 1 << 32


def test_lottery_tickets_differ() -> None:
    image = torch.arange(10_000)
    tickets = lottery_rank(torch.full_like(image, 7), image, 0)
    assert len(tickets.unique()) == len(image)
    assert int(tickets.min()) >= 0 and int(tickets.max()) < 1 << 40


def test_an_activation_that_is_not_finite_names_the_images(tmp_path: Path) -> None:
    dense = activations(5)
    dense[3, 0, 9] = math.nan
    statistics = LatentStatistics(N_LATENTS, PostingSpool(tmp_path))
    batch = CodeBatch(torch.arange(N_IMAGES), as_code(dense.flatten(0, 1)), N_TOKENS)
    with pytest.raises(SparsightError, match="NaN or infinite in images 0 to 89"):
        statistics.add(batch)


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
