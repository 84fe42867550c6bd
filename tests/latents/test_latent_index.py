from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_parts import SITE, TensorActivations, as_version_1, make_sae, save_pictures
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, open_images
from sparsight.latents import (
    LatentIndex,
    LatentName,
    build_index,
    name_from_truth,
    set_names,
    upgrade_index,
)
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

FILES = ("latents.parquet", "top_examples.safetensors", "images.parquet", "manifest.json")
MAPPED = ("by_latent.safetensors", "by_image.safetensors", "label_counts.safetensors")


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    sae: SparseAutoencoder,
    activations: TensorActivations,
) -> LatentIndex:
    return build_index(sae, activations, out=tmp_path_factory.mktemp("index"), top_n=12, quiet=True)


@pytest.fixture
def index(built: LatentIndex, tmp_path: Path) -> LatentIndex:
    """A copy on disk that a test may damage."""
    shutil.copytree(built.folder, tmp_path / "index")
    return LatentIndex.open(tmp_path / "index")


def same(one: LatentIndex, other: LatentIndex) -> bool:
    parts = ("image", "token", "activation")
    return one.table.equals(other.table) and all(
        torch.equal(getattr(a, part), getattr(b, part))
        for a, b in ((one.examples, other.examples), (one.quantiles, other.quantiles))
        for part in parts
    )


def test_the_table_equals_dense_codes_in_float64(
    built: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    dense = sae.encode(activations.x.flatten(0, 1)).dense().double()
    active = dense > 0
    for latent, row in enumerate(built.table.to_pylist()):
        values = dense[active[:, latent], latent]
        assert row["latent"] == latent
        assert row["n_active"] == len(values)
        assert row["density"] == pytest.approx(len(values) / len(dense), rel=1e-15)
        images = active[:, latent].view(len(activations.x), -1).any(1).sum()
        assert row["n_active_images"] == images
        if len(values):
            assert row["mean_activation"] == pytest.approx(float(values.mean()), rel=1e-12)
            assert row["max_activation"] == float(values.max())
        else:
            assert row["mean_activation"] is None
            assert row["max_activation"] == 0
    assert built.table["name"].null_count == built.n_latents


def test_an_example_points_at_the_token_with_its_activation(
    built: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    dense = sae.encode(activations.x.flatten(0, 1)).dense()
    dense = dense.view(*activations.x.shape[:2], -1)
    seen = 0
    for latent in range(built.n_latents):
        top = built.top(latent)
        assert [e.activation for e in top] == sorted((e.activation for e in top), reverse=True)
        for example in [*top, *(e for band in built.samples(latent) for e in band)]:
            assert dense[example.image, example.token, latent] == example.activation
            assert dense[example.image, :, latent].max() == example.activation
            seen += 1
    assert seen > 500


def test_entropy_is_over_the_labels_of_the_top_images(built: LatentIndex) -> None:
    known = [row for row in built.table.to_pylist() if row["label_entropy"] is not None]
    assert known
    for row in known:
        weight: dict[str | None, float] = {}
        for example in built.top(row["latent"]):
            label = built.info(example.image).label
            weight[label] = weight.get(label, 0) + example.activation
        share = torch.tensor(list(weight.values()), dtype=torch.float64) / sum(weight.values())
        assert row["label_entropy"] == pytest.approx(float(-(share * share.log()).sum()))
        assert row["top_label"] == max(weight, key=lambda label: weight[label])
    few = [row for row in built.table.to_pylist() if row["n_active_images"] < 10]
    assert few
    assert all(row["label_entropy"] is None for row in few)


@pytest.mark.parametrize("batch_images", [1, 7])
def test_batches_change_nothing_but_the_last_digits_of_means(
    batch_images: int,
    built: LatentIndex,
    sae: SparseAutoencoder,
    activations: TensorActivations,
    tmp_path: Path,
) -> None:
    # Float32 products differ in their last bits between batch shapes, so integers stand in.
    whole = TensorActivations((activations.x * 8).round(), activations.images, activations.model)
    rounded = make_sae()
    with torch.no_grad():
        for weight in (rounded.W_enc, rounded.W_dec):
            weight.copy_((weight * 8).round())
    reference = build_index(rounded, whole, out=tmp_path / "a", quiet=True)
    other = build_index(rounded, whole, out=tmp_path / "b", batch_images=batch_images, quiet=True)
    assert (reference.table["n_active"].to_numpy() > 0).any()
    columns = ["mean_activation"]
    for column in columns:
        torch.testing.assert_close(
            torch.tensor(reference.table[column].to_numpy()),
            torch.tensor(other.table[column].to_numpy()),
            rtol=1e-13,
            atol=0,
            equal_nan=True,
        )
    assert same(
        LatentIndex(**{**vars(reference), "table": reference.table.drop_columns(columns)}),
        LatentIndex(**{**vars(other), "table": other.table.drop_columns(columns)}),
    )


def test_a_reopened_index_is_the_same(built: LatentIndex) -> None:
    again = LatentIndex.open(built.folder)
    assert same(built, again)
    assert again.site == SITE
    assert again.tokens == "all"
    assert again.manifest["images"]["n_images"] == 36
    assert again.manifest["images"]["n_vectors"] == 36 * 17


def test_a_run_folder_leads_to_its_index(built: LatentIndex, tmp_path: Path) -> None:
    shutil.copytree(built.folder, tmp_path / "index")
    assert same(LatentIndex.open(tmp_path), built)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(index: LatentIndex, name: str, share: float) -> None:
    path = index.folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(SparsightError, match=name):
        LatentIndex.open(index.folder)


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_mapped_file_is_named_when_it_is_used(
    index: LatentIndex, name: str, damage: str
) -> None:
    path = index.folder / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-8] if damage == "cut" else data)
    opened = LatentIndex.open(index.folder)
    with pytest.raises(SparsightError, match=name):
        _ = opened.by_latent, opened.by_image, opened.label_counts(0)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_anywhere(index: LatentIndex, name: str) -> None:
    path = index.folder / name
    good = path.read_bytes()
    for place in range(0, len(good) - 1, max(1, len(good) // 17)):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        if name == "manifest.json" and json.loads(good) == _loads(bad):
            continue  # white space
        with pytest.raises(SparsightError, match=name):
            LatentIndex.open(index.folder)


def _loads(data: bytes | bytearray) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_is_named(index: LatentIndex, name: str) -> None:
    (index.folder / name).unlink()
    with pytest.raises(SparsightError, match=name):
        LatentIndex.open(index.folder)


def test_a_missing_or_newer_index_is_a_user_error(index: LatentIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sparsight index"):
        LatentIndex.open(tmp_path / "nothing")
    path = index.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        LatentIndex.open(index.folder)


def test_an_index_of_another_sae_is_refused(index: LatentIndex, sae: SparseAutoencoder) -> None:
    LatentIndex.open(index.folder, sae)
    other = make_sae()
    with torch.no_grad():
        other.b_enc[3] += 1e-6
    with pytest.raises(UserError, match="another SAE"):
        LatentIndex.open(index.folder, other)


def test_the_hash_of_an_sae_survives_saving(sae: SparseAutoencoder, tmp_path: Path) -> None:
    sae.save_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path).fingerprint() == sae.fingerprint()


def test_names_are_written_and_the_rest_is_untouched(index: LatentIndex) -> None:
    before = index.table
    named = set_names(index, {4: LatentName("sun", 0.9, "truth")})
    named = set_names(named, {7: LatentName("red object", 0.8, "truth")})
    again = LatentIndex.open(index.folder)
    assert again.table.equals(named.table)
    row = again.row(4)
    assert (row["name"], row["name_score"], row["name_source"]) == ("sun", 0.9, "truth")
    assert again.table["name"].null_count == again.n_latents - 2
    unnamed = [name for name in before.column_names if not name.startswith("name")]
    assert again.table.select(unnamed).equals(before.select(unnamed))
    with pytest.raises(UserError, match="no latent 96"):
        set_names(again, {96: LatentName("x", 1.0, "me")})


def test_names_of_two_writers_are_both_kept(index: LatentIndex) -> None:
    first, second = LatentIndex.open(index.folder), LatentIndex.open(index.folder)
    set_names(first, {4: LatentName("sun", 0.9, "me")})
    named = set_names(second, {7: LatentName("moon", 0.9, "you")})
    assert [named.row(latent)["name"] for latent in (4, 7)] == ["sun", "moon"]
    with pytest.raises(UserError, match="another process has changed it"):
        first.with_table(first.table)


@pytest.mark.parametrize("renames", range(6))
def test_an_index_stays_intact_if_killed_while_names_are_written(
    index: LatentIndex, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before each of the renames that put the new files in place."""
    done = 0

    def stopping(rename: Callable[..., Any]) -> Callable[..., Any]:
        def stop(*arguments: Any) -> Any:
            nonlocal done
            if done == renames:
                raise KeyboardInterrupt
            done += 1
            return rename(*arguments)

        return stop

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))
    names = {1: LatentName("sun", 0.9, "truth")}
    with contextlib.suppress(KeyboardInterrupt):
        set_names(index, names)
    stopped = done == renames
    monkeypatch.undo()
    found = LatentIndex.open(index.folder)
    assert stopped or found.row(1)["name"] == "sun"
    assert found.row(1)["name"] in (None, "sun")
    assert set_names(found, names).row(1)["name"] == "sun"
    assert LatentIndex.open(index.folder).firing(1)[0].tolist() == index.firing(1)[0].tolist()


def test_version_1_is_read_and_upgraded_with_its_names(
    index: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    set_names(index, {4: LatentName("sun", 0.9, "truth")})
    old = as_version_1(LatentIndex.open(index.folder))
    assert old.version == 1
    assert old.top(5) == index.top(5)
    assert set_names(old, {7: LatentName("moon", 0.8, "truth")}).row(7)["name"] == "moon"
    for ask in (old.uniform, old.firing, old.label_counts):
        with pytest.raises(UserError, match=r"version 1, .*--upgrade"):
            ask(5)
    with pytest.raises(UserError, match="are not the 12 images"):
        fewer = activations.images.select(range(12))
        upgrade_index(old.folder, sae, TensorActivations(activations.x, fewer, activations.model))
    new = upgrade_index(old.folder, sae, activations, quiet=True)
    assert new.version == 2
    assert [new.row(latent)["name"] for latent in (4, 7, 8)] == ["sun", "moon", None]
    assert new.manifest["settings"]["top_n"] == 12
    assert new.firing(5)[0].tolist() == index.firing(5)[0].tolist()
    assert upgrade_index(new.folder, sae, activations).manifest == new.manifest


def test_an_index_knows_all_images_and_their_labels(
    built: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    peaks = sae.encode(activations.x.flatten(0, 1)).dense().view(36, 17, -1).amax(1)
    assert built.n_places == built.images.num_rows == 36
    labels = built.images["label"].to_pylist()
    assert built.label_totals == {label: labels.count(label) for label in sorted(set(labels))}
    for latent in range(0, 96, 7):
        places, values = built.firing(latent)
        assert places.tolist() == peaks[:, latent].nonzero().flatten().tolist()
        assert values.tolist() == peaks[places.astype(int), latent].tolist()
        fires = [labels[place] for place in places]
        assert built.label_counts(latent) == {label: fires.count(label) for label in set(fires)}
        uniform = [example.image for example in built.uniform(latent)]
        distinct = len(places) - built.row(latent)["n_near_duplicates"]
        assert len(uniform) == min(16, distinct) and set(uniform) <= set(places.tolist())
    with pytest.raises(UserError, match="no image 36"):
        built.info(36)


def test_latents_are_named_in_words_after_the_attribute_that_they_detect_best(
    index: LatentIndex,
) -> None:
    found = {
        "2": {"attribute": "symbol/chess_king", "auc": 0.99, "f1": 0.9},
        "5": {"attribute": "object_colour/red", "auc": 0.9, "f1": 0.7},
        "6": {"attribute": "word/anchor", "auc": 0.9, "f1": 0.1},
        "7": {"attribute": "pattern/plain", "auc": None, "f1": None},
    }
    named = name_from_truth(index, {"truth": {}, "latent_names": found, "n_latents": 96})
    assert named.row(2)["name"] == "chess king"
    assert named.row(2)["name_score"] == 0.9
    assert "F1" in named.row(2)["name_source"]
    assert named.row(5)["name"] == "red object"
    assert named.row(6)["name"] is None
    assert named.row(7)["name"] is None
    assert (
        name_from_truth(named, {"latent_names": found}, 0.05).row(6)["name"] == "the word “anchor”"
    )


def test_names_need_metrics_of_this_sae_with_a_truth_table(index: LatentIndex) -> None:
    with pytest.raises(UserError, match="truth"):
        name_from_truth(index, {"fvu": 0.1})
    with pytest.raises(UserError, match="128 latents"):
        name_from_truth(index, {"latent_names": {}, "n_latents": 128})


def test_images_are_found_by_id_when_others_come_or_go(
    sae: SparseAutoencoder, model: VisionModel, tmp_path: Path
) -> None:
    folder = save_pictures(tmp_path / "pictures", 12)
    source = open_images(folder)
    x = torch.randn(12, 17, 32, generator=torch.Generator().manual_seed(0))
    built = build_index(
        sae, TensorActivations(x, source, model), out=tmp_path / "index", quiet=True
    )
    images = sorted({e.image for latent in range(96) for e in built.top(latent)})
    first, last = images[0], images[-1]
    expected = source.load(last).tobytes()
    Path(source.info(first).uri).unlink()
    again = LatentIndex.open(built.folder)
    assert again.picture(last).tobytes() == expected
    with pytest.raises(UserError, match=r"no longer in"):
        again.picture(first)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="cannot be opened"):
        LatentIndex.open(built.folder).picture(last)


def test_mismatched_inputs_are_refused(
    sae: SparseAutoencoder, activations: TensorActivations, source: ImageSource, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    with pytest.raises(UserError, match=r"Not read here: .blocks\.0\.resid_post"):
        build_index(sae, activations, out=out, site="blocks.0.resid_post")
    with pytest.raises(UserError, match="32 dimensions, but the SAE takes 16"):
        build_index(make_sae(d_in=16), activations, out=out)
    with pytest.raises(UserError, match="tokens='cls'"):
        build_index(make_sae(tokens="cls"), activations, out=out)
    with pytest.raises(UserError, match="weights differ"):
        other = make_sae(model={"id": "x", "weights_hash": "0"})
        build_index(other, activations, out=out)
    with pytest.raises(UserError, match="top_n is 0"):
        build_index(sae, activations, out=out, top_n=0)
    sae.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="holds an SAE"):
        build_index(sae, activations, out=tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="leave `images` out"):
        build_index(sae, activations, source, out=out)
    assert not out.exists()


def test_activations_that_are_not_finite_stop_the_build(
    sae: SparseAutoencoder, activations: TensorActivations, tmp_path: Path
) -> None:
    x = activations.x.clone()
    x[20, 3, 5] = torch.inf
    bad = TensorActivations(x, activations.images, activations.model)
    with pytest.raises(SparsightError, match="images 16 to 23"):
        build_index(sae, bad, out=tmp_path / "index", batch_images=8, quiet=True)
    assert not (tmp_path / "index").exists()


def test_a_model_and_images_give_the_index_that_stored_activations_give(
    built: LatentIndex,
    sae: SparseAutoencoder,
    model: VisionModel,
    source: ImageSource,
    tmp_path: Path,
) -> None:
    live = build_index(
        sae, model, source, out=tmp_path, top_n=12, batch_images=12, workers=0, quiet=True
    )
    assert live.table["n_active"].equals(built.table["n_active"])
    assert torch.equal(live.examples.image, built.examples.image)
    assert live.manifest["images"] == built.manifest["images"]


def test_a_full_disk_leaves_the_old_index(
    index: LatentIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {each.name: each.read_bytes() for each in index.folder.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SparsightError, match="No space left"):
            set_names(index, {1: LatentName("sun", 0.9, "truth")})
    assert {each.name: each.read_bytes() for each in index.folder.iterdir()} == before
