from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from activation_parts import BLOCK_0, BLOCK_1, N_IMAGES, everything, flip_bit, save_photos
from sparsight.activations import ActivationSource, ActivationStore, LiveActivations, extract
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, open_images
from sparsight.vision import VisionModel

SHARD = f"{BLOCK_1}/shard-00001.safetensors"


def test_stores_and_live_activations_are_activation_sources(
    kept_store: ActivationStore, model: VisionModel, photos: ImageSource
) -> None:
    live = LiveActivations(model, photos, [BLOCK_0])
    assert isinstance(kept_store, ActivationSource)
    assert isinstance(live, ActivationSource)
    assert live.model_info == kept_store.model_info
    assert kept_store.model_info["weights_hash"] == model.weights_hash
    assert kept_store.d_in("embedding") == 16


def test_ordered_gives_every_image_once_with_its_place_in_the_source(
    kept_store: ActivationStore,
) -> None:
    batches = list(kept_store.ordered([BLOCK_0, "embedding"], batch_images=5))
    assert torch.cat([b.image_indices for b in batches]).tolist() == list(range(N_IMAGES))
    assert batches[0].activations[BLOCK_0].shape == (5, 5, 32)
    assert batches[-1].activations["embedding"].shape == (3, 1, 16)
    again = everything(kept_store, BLOCK_0)
    assert torch.equal(torch.cat([b.activations[BLOCK_0] for b in batches]), again)


def test_places_of_images_skip_the_broken_ones(model: VisionModel, tmp_path: Path) -> None:
    images = open_images(str(save_photos(tmp_path / "photos", 9, broken=(4,))))
    store = extract(
        model, images, sites=[BLOCK_0], out=tmp_path / "s", max_failed=0.2, workers=0, quiet=True
    )
    batches = list(store.ordered([BLOCK_0], batch_images=2))
    found = torch.cat([batch.image_indices for batch in batches]).tolist()
    broken = [row["index"] for row in store.images.to_pylist() if row["status"] == "failed"]
    assert len(broken) == 1
    assert found == [i for i in range(9) if i not in broken]
    assert [store.source().info(i).id for i in found] == [
        row["id"] for row in store.images.to_pylist() if row["status"] == "ok"
    ]


def test_a_selection_is_a_source_with_its_own_statistics(kept_store: ActivationStore) -> None:
    chosen = [3, 9, 10, 22]
    view = kept_store.select(chosen)
    x = everything(kept_store, BLOCK_1)[chosen]
    assert view.n_images == 4 and view.n_vectors(BLOCK_1) == 20
    assert torch.equal(everything(view, BLOCK_1), x)
    assert next(iter(view.ordered([BLOCK_1]))).image_indices.tolist() == chosen
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(view.stats(BLOCK_1).mean, flat.mean(0), rtol=1e-12, atol=1e-14)
    batch = next(view.stream([BLOCK_1], 20))[BLOCK_1]
    assert sorted(map(tuple, batch.tolist())) == sorted(map(tuple, x.flatten(0, 1).tolist()))
    assert view.select([9]).n_images == 1
    assert kept_store.n_images == N_IMAGES
    assert kept_store.stats(BLOCK_1).count == N_IMAGES * 5
    with pytest.raises(UserError, match="image 4"):
        view.select([4])


def test_a_store_finds_its_images_again_unless_they_changed(
    model: VisionModel, tmp_path: Path
) -> None:
    folder = save_photos(tmp_path / "photos", 5)
    images = open_images(str(folder))
    store = extract(
        model, images, sites=[BLOCK_0], out=tmp_path / "s", workers=0, dtype="float32", quiet=True
    )
    again = ActivationStore(tmp_path / "s").source()
    assert [again.info(i) for i in range(5)] == [images.info(i) for i in range(5)]
    next(folder.rglob("*.jpg")).unlink()
    with pytest.raises(UserError, match="have changed"):
        store.source()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_off_shard_is_named_when_the_store_is_opened(own_store: Path, keep: int) -> None:
    data = (own_store / SHARD).read_bytes()
    (own_store / SHARD).write_bytes(data[:keep])
    with pytest.raises(SparsightError, match=rf"{SHARD}: has [\d,]+ bytes, [\d,]+ were written"):
        ActivationStore(own_store)


def test_a_missing_shard_is_named_when_the_store_is_opened(own_store: Path) -> None:
    (own_store / SHARD).unlink()
    with pytest.raises(SparsightError, match=rf"{SHARD}: is missing"):
        ActivationStore(own_store)


@pytest.mark.parametrize("name", [SHARD, f"{BLOCK_0}/stats.safetensors", "images.parquet"])
def test_one_flipped_bit_is_found_by_verify(own_store: Path, name: str) -> None:
    ActivationStore(own_store, verify=True)
    flip_bit(own_store / name, (own_store / name).stat().st_size // 2)
    with pytest.raises(SparsightError, match=rf"{name}: .*altered"):
        ActivationStore(own_store, verify=True)
    with pytest.raises(SparsightError, match=rf"{name}: .*altered"):
        ActivationStore(own_store).verify()


@pytest.mark.parametrize("at", [0, 7, 12, 40])
def test_a_flipped_bit_in_a_header_is_found_when_the_shard_is_read(
    own_store: Path, at: int
) -> None:
    flip_bit(own_store / SHARD, at)
    store = ActivationStore(own_store)
    with pytest.raises(SparsightError, match=rf"{SHARD}: its header"):
        everything(store, BLOCK_1)
    everything(store, BLOCK_0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_found_where_they_lie(
    own_store: Path, value: float
) -> None:
    x = load_file(own_store / SHARD)["activations"]
    header = (own_store / SHARD).stat().st_size - x.numel() * 4
    x[5, 2, 7] = value
    data = (own_store / SHARD).read_bytes()[:header] + x.numpy().tobytes()
    (own_store / SHARD).write_bytes(data)
    store = ActivationStore(own_store)
    with pytest.raises(SparsightError, match=rf"NaN or infinite in .*{SHARD}"):
        everything(store, BLOCK_1)
    stream = store.stream([BLOCK_0, BLOCK_1], 10)
    with pytest.raises(SparsightError, match=rf"NaN or infinite in .*{SHARD}"):
        for _ in range(N_IMAGES):
            next(stream)


def test_damaged_statistics_and_image_lists_are_named(own_store: Path) -> None:
    path = own_store / BLOCK_0 / "stats.safetensors"
    stats = load_file(path)
    save_file(stats | {"count": stats["count"] + 1}, path)
    with pytest.raises(SparsightError, match=r"stats\.safetensors: does not fit"):
        ActivationStore(own_store).stats(BLOCK_0)
    path.write_bytes(b"nothing")
    with pytest.raises(SparsightError, match=r"stats\.safetensors: is missing or damaged"):
        ActivationStore(own_store).stats(BLOCK_0)
    (own_store / "images.parquet").write_bytes(b"nothing")
    with pytest.raises(SparsightError, match=r"images\.parquet: is missing or damaged"):
        everything(ActivationStore(own_store), BLOCK_0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99"),
        ({"dtype": "int4"}, "int4"),
        ({"sites": ["../../etc"]}, "not the name of a site"),
        ({"sites": []}, "sites is empty"),
        ({"d_in": {}}, "d_in"),
        ({"state": "half"}, "half"),
        ({"state": "incomplete"}, "unfinished"),
        ({"shards": []}, "cover 0 images of 23"),
        ({"images": {"spec": "x"}}, "fingerprint"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    own_store: Path, change: dict[str, Any], message: str
) -> None:
    path = own_store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        ActivationStore(own_store)


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no activation store \(it has no manifest\.json\)"):
        ActivationStore(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"format_ver')
    with pytest.raises(SparsightError, match=r"cannot be read as JSON .* Remove "):
        ActivationStore(tmp_path)


def test_an_unknown_site_is_refused_and_the_known_are_listed(kept_store: ActivationStore) -> None:
    for ask in (kept_store.stats, kept_store.d_in, lambda site: kept_store.stream([site], 4)):
        with pytest.raises(UserError, match=rf"no site 'blocks.5.mlp_out', only: {BLOCK_0}"):
            ask("blocks.5.mlp_out")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_reading_keeps_no_file_open(kept_store: ActivationStore) -> None:
    store = ActivationStore(kept_store.path)
    stream = store.stream([BLOCK_0, BLOCK_1], 10)
    next(stream)
    everything(store, BLOCK_0)
    open_files = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert not [file for file in open_files if file.startswith(str(store.path.resolve()))]


def test_a_negative_block_counts_from_the_end(kept_store: ActivationStore) -> None:
    assert kept_store.canonical_site("blocks.-1.resid_post") == BLOCK_1
    assert kept_store.d_in("blocks.-2.resid_post") == kept_store.d_in(BLOCK_0)
    with pytest.raises(UserError, match=r"no site 'blocks\.-9\.resid_post', only: "):
        kept_store.d_in("blocks.-9.resid_post")


def test_other_vectors_have_another_fingerprint(
    model: VisionModel, kept_store: ActivationStore, photos: ImageSource, tmp_path: Path
) -> None:
    def made(name: str, images: ImageSource, **options: Any) -> str:
        out = tmp_path / name
        options = {"sites": [BLOCK_0], "workers": 0, "quiet": True} | options
        return extract(model, images, out=out, **options).fingerprint

    first = made("first", photos)
    assert made("again", photos) == first == ActivationStore(tmp_path / "first").fingerprint
    others = [
        made("type", photos, dtype="bfloat16"),
        made("tokens", photos, tokens="cls"),
        made("images", photos.subset(0, 7)),
        ActivationStore(tmp_path / "first").select([1, 2]).fingerprint,
        ActivationStore(tmp_path / "first").select([1, 3]).fingerprint,
        LiveActivations(model, photos, [BLOCK_0]).fingerprint,
        LiveActivations(model, photos.subset(0, 7), [BLOCK_0]).fingerprint,
    ]
    assert len({first, *others}) == 8


@pytest.mark.parametrize(("tokens", "expected"), [("cls", 1), ("patches", 4), ("mean", 1)])
def test_a_store_of_all_positions_gives_views_of_some(
    tokens: str, expected: int, kept_store: ActivationStore, model: VisionModel, photos: ImageSource
) -> None:
    view = kept_store.with_tokens(tokens)
    live = LiveActivations(model, photos, kept_store.sites, tokens)
    assert view.tokens == tokens and view.n_tokens == live.n_tokens
    assert view.n_tokens[BLOCK_0] == expected and view.n_tokens["embedding"] == 1
    x = everything(view, BLOCK_1)
    torch.testing.assert_close(x, everything(live, BLOCK_1), rtol=2e-3, atol=2e-3)
    mean = x.flatten(0, 1).double().mean(dim=0)
    torch.testing.assert_close(view.stats(BLOCK_1).mean, mean)
    assert view.stats(BLOCK_1).count == len(x) * expected
    batch = next(view.stream([BLOCK_0], len(x) * expected))[BLOCK_0]
    every = everything(view, BLOCK_0).flatten(0, 1)
    assert torch.equal(batch.sort(dim=0).values, every.sort(dim=0).values)
    assert len({view.fingerprint, kept_store.fingerprint, kept_store.fingerprint}) == 2
    chosen = view.select([3, 9])
    assert torch.equal(everything(chosen, BLOCK_1), x[[3, 9]])


def test_a_view_of_positions_that_a_store_does_not_hold_is_refused(
    kept_store: ActivationStore,
) -> None:
    assert kept_store.with_tokens("all") is kept_store
    assert kept_store.with_tokens("cls").with_tokens("cls").tokens == "cls"
    with pytest.raises(UserError, match=r"tokens is 'all', but the activations are of 'cls'"):
        kept_store.with_tokens("cls").with_tokens("all")
    with pytest.raises(UserError, match="tokens is 'heads'"):
        kept_store.with_tokens("heads")
