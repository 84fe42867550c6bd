"""Neighbours by co-activation, near misses and embeddings, against all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from latent_parts import SITE, TensorActivations, make_sae
from sparsight.errors import UserError
from sparsight.images import ImageSource, open_images
from sparsight.latents import LatentIndex, build_index, neighbours_across
from sparsight.latents import coactivation as module
from sparsight.latents.coactivation import Coactivation
from sparsight.latents.embeddings import ImageEmbeddings
from sparsight.latents.neighbour_tables import Neighbour
from sparsight.latents.postings import Postings
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel


def lists(dense: np.ndarray) -> Postings:
    rows, columns = dense.nonzero()
    offsets = np.concatenate([[0], np.bincount(rows, minlength=len(dense)).cumsum()])
    values = dense[rows, columns].astype(np.float32)
    return Postings(
        offsets.astype(np.int64), columns.astype(np.int32), values, None, dense.shape[1]
    )


@dataclass
class Planted:
    """Posting lists of a dense matrix of activations, images × latents."""

    dense: np.ndarray
    image_places: np.ndarray

    @property
    def by_image(self) -> Postings:
        return lists(self.dense)

    @property
    def by_latent(self) -> Postings:
        return lists(np.ascontiguousarray(self.dense.T))


def planted(n_latents: int = 40, n_images: int = 90, seed: int = 0) -> Planted:
    random = np.random.default_rng(seed)
    active = random.random((n_images, n_latents)) < random.uniform(0.02, 0.6, n_latents)
    dense = np.where(active, random.random((n_images, n_latents)) + 0.1, 0).astype(np.float32)
    dense[:, 5] = 0  # never fires
    dense[:, 6] = 1  # the same everywhere, so that it has no correlation
    dense[:, 7] = dense[:, 8] * 3
    return Planted(dense, np.arange(n_images))


def correlated(one: np.ndarray, other: np.ndarray, same: bool) -> np.ndarray:
    """Correlations of all pairs in float64; −1 where a pair does not count."""
    one, other = (each.astype(np.float64) - each.mean(0) for each in (one, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = one.T @ other / np.outer(np.linalg.norm(one, axis=0), np.linalg.norm(other, axis=0))
    found[:, np.linalg.norm(other, axis=0) < 1e-6] = -1
    found[np.linalg.norm(one, axis=0) < 1e-6] = -1
    if same:
        np.fill_diagonal(found, -1)
    return found


@pytest.mark.parametrize("dense", [False, True])
def test_coactive_latents_are_those_of_all_pairs(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = planted(), planted(30, seed=1)
    monkeypatch.setattr(Coactivation, "_prefers_dense", lambda *_: dense)
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 300)
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 64)
    for second, same in ((one, True), (other, False)):
        fires = (one.dense > 0).astype(int).T @ (second.dense > 0)
        wanted = np.where(fires > 0, correlated(one.dense, second.dense, same), -1)
        table = Coactivation(one, None if same else second).table(n=6)
        assert table.images is not None
        for latent, scores in enumerate(wanted):
            best = [score for score in np.sort(scores)[::-1][:6] if score > 0]
            neighbours = table.row(latent)
            closest = [each.latent for each in neighbours]  # equals may come in any order
            np.testing.assert_allclose([e.score for e in neighbours], best, atol=1e-5)
            np.testing.assert_allclose(scores[closest], best, atol=1e-5)
            assert [each.images for each in neighbours] == fires[latent, closest].tolist()
            assert len(set(closest)) == len(closest)
    assert Coactivation(one).of(7)[0].latent == 8
    assert Coactivation(one).of(5) == Coactivation(one).of(6) == []


def test_only_images_that_both_indexes_have_read_count() -> None:
    one, other = planted(), planted(30, seed=1)
    one.image_places, other.image_places = np.arange(0, 80), np.arange(10, 90)
    both = slice(10, 80)
    wanted = correlated(one.dense[both], other.dense[both], same=False)
    for latent in range(0, 40, 9):
        for neighbour in Coactivation(one, other).of(latent, n=5):
            assert neighbour.score == pytest.approx(wanted[latent, neighbour.latent], abs=1e-5)


def test_a_large_table_takes_a_seeded_sample_of_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = planted()
    monkeypatch.setattr(module, "MOST_PAIRS", 700)
    first, again, other = (Coactivation(one, sample=seed) for seed in (0, 0, 1))
    assert first.sampled and 0 < first.n_images < 90
    assert np.array_equal(first.counts, again.counts)
    assert not np.array_equal(first.counts, other.counts)
    assert not Coactivation(one).sampled


def same_neighbours(one: list[Neighbour], other: list[Neighbour]) -> bool:
    """Whether they are the same up to rounding."""
    return [(e.latent, e.images) for e in one] == [(e.latent, e.images) for e in other] and [
        e.score for e in one
    ] == pytest.approx([e.score for e in other], abs=1e-5)


@pytest.fixture(scope="module")
def copies(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """Twelve pictures, of which the last two repeat the first in other files."""
    folder = tmp_path_factory.mktemp("copies")
    originals = sorted(pictures.rglob("*.png"))[:10]
    for number, path in enumerate([*originals, originals[0], originals[0]]):
        with Image.open(path) as image:
            image.save(folder / f"{number:02d}.png", compress_level=number % 9)
    return open_images(folder)


@pytest.fixture(scope="module")
def built(
    model: VisionModel,
    copies: ImageSource,
    sae: SparseAutoencoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> LatentIndex:
    out = tmp_path_factory.mktemp("near") / "index"
    return build_index(sae, model, copies, out=out, workers=0, quiet=True)


def test_an_index_keeps_neighbours_by_decoder_and_a_place_on_the_map(
    built: LatentIndex, sae: SparseAutoencoder
) -> None:
    live = built.by_latent.counts > 0
    unit = normalize(sae.W_dec, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-1).masked_fill(torch.from_numpy(~live), -1)
    for latent in range(0, 96, 5):
        score, best = cosines[latent].topk(4)
        neighbours = built.neighbours(latent, n=4)
        assert [each.latent for each in neighbours] == best.tolist()
        assert [each.score for each in neighbours] == pytest.approx(score.tolist(), abs=1e-5)
    for name in ("map_x", "map_y"):
        there = [value is not None for value in built.table[name].to_pylist()]
        assert there == live.tolist()
    most = int(np.argmax(built.by_latent.counts * (built.by_latent.counts < 12)))
    found = built.neighbours(most, "coactivation", n=3)
    assert same_neighbours(found, Coactivation(built).of(most, n=3))


def test_near_misses_are_the_closest_images_in_which_a_latent_does_not_fire(
    built: LatentIndex,
) -> None:
    matrix = built.embeddings.matrix.float()
    for latent in np.flatnonzero(built.by_latent.counts)[::7].tolist():
        top = built.top(latent)
        centre = sum(each.activation * matrix[each.image] for each in top)
        cosines = matrix @ normalize(centre, dim=0)
        fires = built.firing(latent)[0]
        cosines[torch.from_numpy(fires.astype(np.int64))] = -9
        cosines[10:] = -9  # repeats of image 0
        wanted = [i for i in cosines.argsort(descending=True).tolist() if cosines[i] > -9][:8]
        assert [miss.image for miss in built.near_misses(latent)] == wanted
    assert built.manifest["near_misses"]["n_candidates"] == 10


def test_repeated_images_count_once_among_examples_and_the_index_says_so(
    built: LatentIndex,
) -> None:
    assert built.manifest["near_duplicates"]["n_images"] == 2
    counted = 0
    for latent in range(96):
        places = built.firing(latent)[0].tolist()
        repeats = max(0, sum(place in (0, 10, 11) for place in places) - 1)
        assert built.row(latent)["n_near_duplicates"] == repeats
        shown = [each.image for each in built.top(latent)]
        assert sum(image in (0, 10, 11) for image in shown) <= 1
        assert len(shown) == min(16, len(places) - repeats)
        counted += repeats
    assert counted > 0


def test_the_nearest_images_to_an_image_are_those_of_all_pairs(
    built: LatentIndex, model: VisionModel, copies: ImageSource
) -> None:
    embeddings = built.embeddings
    assert embeddings.kind == "pooled"
    pixels = torch.stack([model.transform(copies.load(i)) for i in range(12)])
    pooled = model.read(pixels, [SITE])[SITE].mean(1)
    unit = normalize(pooled - pooled.mean(0), dim=1)
    torch.testing.assert_close(embeddings.matrix.float(), unit, atol=1e-3, rtol=0)
    wanted = (unit @ unit[3]).argsort(descending=True).tolist()[1:5]
    assert [each.image for each in embeddings.nearest_to(3, 4)] == wanted
    photo = Path(copies.info(3).uri)
    closest = embeddings.nearest_to_photo(photo, model, 2)
    assert closest[0].image == 3 and closest[0].cosine == pytest.approx(1, abs=1e-3)
    assert closest[1].image == wanted[0]


def test_a_search_that_embeddings_cannot_answer_is_refused(
    built: LatentIndex, model: VisionModel
) -> None:
    with pytest.raises(UserError, match="are pooled, so texts cannot be compared"):
        built.embeddings.nearest_to_text("a dog", model)
    with pytest.raises(UserError, match="There is no image 99 among the 12"):
        built.embeddings.nearest_to(99)
    with pytest.raises(UserError, match="image file does not exist"):
        built.embeddings.nearest_to_photo("nowhere.png", model)


def test_joint_embeddings_are_those_of_the_model_from_the_same_pass(
    model: VisionModel, copies: ImageSource, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    index = build_index(
        sae, model, copies, out=tmp_path / "i", embeddings="joint", workers=0, quiet=True
    )
    pixels = torch.stack([model.transform(copies.load(i)) for i in range(12)])
    unit = normalize(model.embed_images(pixels), dim=1)
    torch.testing.assert_close(index.embeddings.matrix.float(), unit, atol=1e-3, rtol=0)


def test_an_index_without_embeddings_and_neighbours_says_how_to_get_them(
    activations: TensorActivations, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    index = build_index(
        sae, activations, out=tmp_path / "i", embeddings="none", neighbours=False, quiet=True
    )
    for ask in (lambda: index.embeddings, lambda: index.near_misses(0)):
        with pytest.raises(UserError, match="without --embeddings none"):
            ask()
    with pytest.raises(UserError, match="without --no-neighbours"):
        index.neighbours(0)


def test_neighbours_across_need_the_same_images_or_the_same_space(
    built: LatentIndex, activations: TensorActivations, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    other_sae = make_sae(n_latents=64, **{"model": sae.metadata["model"]})
    other = build_index(other_sae, activations, out=tmp_path / "o", quiet=True)
    same = build_index(sae, activations, out=tmp_path / "s", quiet=True)
    with pytest.raises(UserError, match="built from different images"):
        neighbours_across(built, other)
    table = neighbours_across(same, other, n=3)
    some = neighbours_across(same, other, latents=[4, 9], n=3)
    assert table.latent.shape == (96, 3)
    assert same_neighbours(table.row(9), some.row(1))
    assert same_neighbours(table.row(9), Coactivation(same, other).of(9, 3))
    with pytest.raises(UserError, match="need both SAEs"):
        neighbours_across(same, other, by="decoder")
    by_decoder = neighbours_across(same, other, by="decoder", saes=(sae, other_sae), latents=[70])
    live = other.by_latent.counts > 0
    cosines = normalize(other_sae.W_dec, dim=1) @ normalize(sae.W_dec[70], dim=0)
    best = cosines.masked_fill(torch.from_numpy(~live), -1).argmax()
    closest = by_decoder.row(0)[0]
    assert (closest.latent, closest.images) == (int(best), None)
    assert closest.score == pytest.approx(float(cosines[best]), abs=1e-5)
    with pytest.raises(UserError, match="no latent 96"):
        neighbours_across(same, other, latents=[96])


def test_a_search_in_float16_gives_the_exact_order_of_float32() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = normalize(torch.randn(3000, 64, generator=random) * 0.3 + 1, dim=1).half()
    embeddings = ImageEmbeddings("joint", matrix, np.arange(3000) * 2, None, {})
    query = torch.randn(64, generator=random) * 0.3 + 1
    cosines = matrix.float() @ normalize(query, dim=0)
    found = embeddings.nearest(query, 20)
    assert [each.image for each in found] == (cosines.argsort(descending=True)[:20] * 2).tolist()
