from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from activation_parts import BLOCK_0, BLOCK_1, N_IMAGES, digests, everything, save_photos
from images.picture_files import with_damaged_labels
from sparsight.activations import ActivationStore, LiveActivations, extract, matching_sites
from sparsight.activations.writer import StoreWriter
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, load_batches, open_images
from sparsight.vision import VisionModel, load_model

SETTINGS: dict[str, Any] = {
    "sites": [BLOCK_0, BLOCK_1],
    "batch_size": 4,
    "shard_images": 8,
    "workers": 0,
    "quiet": True,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", ["all", "patches", "cls", "mean"])
def test_a_store_holds_what_the_model_gives_rounded_to_its_type(
    model: VisionModel, photos: ImageSource, tmp_path: Path, tokens: Any, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    store = extract(model, photos, out=tmp_path / "s", tokens=tokens, dtype=name, **SETTINGS)
    batches = load_batches(photos, model.transform, 4, workers=0)
    read = [model.read(batch.pixels, [BLOCK_0, BLOCK_1], tokens) for batch in batches]
    for site in (BLOCK_0, BLOCK_1):
        expected = torch.cat([each[site] for each in read]).to(dtype).float()
        assert torch.equal(everything(store, site), expected)
        assert store.n_vectors(site) == expected.shape[0] * expected.shape[1]


def test_statistics_are_those_of_the_stored_numbers(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    store = extract(model, photos, out=tmp_path / "s", **SETTINGS)
    for site in store.sites:
        x = everything(store, site).flatten(0, 1).double()
        found = store.stats(site)
        assert found.count == len(x) == N_IMAGES * 5
        assert found.mean.dtype == found.second_moment.dtype == torch.float64
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.second_moment, x.square().mean(0), rtol=1e-12, atol=0)


def test_statistics_do_not_depend_on_shards(
    model: VisionModel, photos: ImageSource, tmp_path: Path, kept_store: ActivationStore
) -> None:
    settings = SETTINGS | {"shard_images": 100, "dtype": "float32"}
    one = extract(model, photos, out=tmp_path / "s", **settings).stats(BLOCK_1)
    many = kept_store.stats(BLOCK_1)
    torch.testing.assert_close(one.mean, many.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.second_moment, many.second_moment, rtol=1e-12, atol=0)


def test_decoding_in_workers_changes_no_byte(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    extract(model, photos, out=tmp_path / "here", **SETTINGS)
    extract(model, photos, out=tmp_path / "workers", **SETTINGS | {"workers": 2})
    assert digests(tmp_path / "here") == digests(tmp_path / "workers")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_shards_and_statistics_are_plain_safetensors(
    model: VisionModel, photos: ImageSource, tmp_path: Path, dtype: str
) -> None:
    store = extract(model, photos, out=tmp_path / "s", dtype=dtype, **SETTINGS)
    shards = sorted((tmp_path / "s" / BLOCK_0).glob("shard-*.safetensors"))
    x = torch.cat([load_file(path)["activations"] for path in shards])
    assert [path.name for path in shards] == [f"shard-{n:05d}.safetensors" for n in range(3)]
    assert x.dtype == getattr(torch, dtype)
    assert torch.equal(x.float(), everything(store, BLOCK_0))
    stats = load_file(tmp_path / "s" / BLOCK_0 / "stats.safetensors")
    assert int(stats["count"]) == N_IMAGES * 5
    assert torch.equal(stats["mean"], store.stats(BLOCK_0).mean)


def test_a_broken_image_is_recorded_with_its_reason_and_left_out(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    spoiled = open_images(str(save_photos(tmp_path / "photos", broken=(6,))))
    store = extract(model, spoiled, out=tmp_path / "s", max_failed=0.1, **SETTINGS)
    whole = extract(model, photos, out=tmp_path / "whole", **SETTINGS)
    rows = store.images.to_pylist()
    assert [row["index"] for row in rows] == list(range(N_IMAGES))
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["id"] for row in failed] == ["even/006.jpg"]
    assert failed[0]["reason"] and failed[0]["width"] is None and failed[0]["shard"] is None
    assert store.n_images == store.manifest.n_images == N_IMAGES - 1
    assert store.summary is not None
    assert (store.summary.images, store.summary.failed) == (N_IMAGES - 1, 1)
    for row in rows:
        if row["status"] == "ok":
            assert (row["width"], row["height"]) == (40, 32)
            assert row["label"] == row["id"].split("/")[0]
            shard = load_file(tmp_path / f"s/{BLOCK_0}/shard-{row['shard']:05d}.safetensors")
            expected = everything(whole, BLOCK_0)[row["index"]]
            found = shard["activations"][row["row"]].float()
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_shard_of_broken_images_alone_is_empty(model: VisionModel, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", 6)
    for path in sorted(photos.rglob("*.jpg"))[:4]:
        path.write_bytes(b"no picture")
    settings = SETTINGS | {"batch_size": 2, "shard_images": 2}
    images = open_images(str(photos))
    store = extract(model, images, out=tmp_path / "s", max_failed=1.0, **settings)
    assert [shard.n_images for shard in store.manifest.shards] == [0, 0, 2]
    assert [b.image_indices.tolist() for b in store.ordered([BLOCK_0])] == [[4, 5]]
    store.verify()


def test_too_many_broken_images_stop_and_a_higher_limit_goes_on(
    model: VisionModel, tmp_path: Path
) -> None:
    images = open_images(str(save_photos(tmp_path / "photos", broken=(2, 3, 5))))
    with pytest.raises(SparsightError, match=r"3 of 23 images .* 0\.1 .*even/002\.jpg: "):
        extract(model, images, out=tmp_path / "s", max_failed=0.1, **SETTINGS)
    # What was read stays, and so do the reasons.
    with pytest.raises(SparsightError, match=r"3 of 23 images .*even/002\.jpg: "):
        extract(model, images, out=tmp_path / "s", max_failed=0.1, **SETTINGS)
    store = extract(model, images, out=tmp_path / "s", max_failed=0.2, **SETTINGS)
    assert store.n_images == N_IMAGES - 3
    assert store.summary is not None and store.summary.images == 0


def test_numbers_beyond_float16_are_refused_before_anything_is_stored(
    own_model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    with torch.no_grad():
        own_model.module.vision_model.encoder.layers[1].mlp.fc2.bias.fill_(1e5)
    with pytest.raises(SparsightError, match=rf"{BLOCK_1}: .*float16 .*bfloat16 or float32"):
        extract(own_model, photos, out=tmp_path / "s", **SETTINGS)
    assert not list((tmp_path / "s").rglob("shard-*"))
    extract(own_model, photos, out=tmp_path / "b", dtype="bfloat16", **SETTINGS)


def test_nan_stops_and_names_site_shard_and_image(
    own_model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    with torch.no_grad():
        own_model.module.vision_model.encoder.layers[1].mlp.fc2.bias[3] = float("nan")
    with pytest.raises(SparsightError, match=rf"{BLOCK_1}: .*NaN .*shard 0, image even/000\.jpg"):
        extract(own_model, photos, out=tmp_path / "s", **SETTINGS)
    extract(own_model, photos, out=tmp_path / "t", **SETTINGS | {"sites": [BLOCK_0]})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sites": [BLOCK_0]}, "sites"),
        ({"tokens": "cls"}, "tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_a_store_of_other_settings_is_refused_with_both_values(
    model: VisionModel, photos: ImageSource, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    extract(model, photos, out=tmp_path / "s", **SETTINGS)
    before = digests(tmp_path / "s")
    with pytest.raises(UserError, match=rf"{field}.* is .*asked for is ") as caught:
        extract(model, photos, out=tmp_path / "s", **SETTINGS | change)
    assert str(tmp_path / "s") in str(caught.value)
    assert digests(tmp_path / "s") == before


def test_a_store_of_another_model_preprocessing_or_images_is_refused(
    model: VisionModel, clip_folder: Path, photos: ImageSource, tmp_path: Path
) -> None:
    extract(model, photos, out=tmp_path / "s", **SETTINGS)
    other = load_model(str(clip_folder), device="cpu")
    with torch.no_grad():
        other.module.vision_model.encoder.layers[0].mlp.fc2.bias.add_(1)
    with pytest.raises(UserError, match=r"model\.weights_hash"):
        extract(other, photos, out=tmp_path / "s", **SETTINGS)
    other = load_model(str(clip_folder), device="cpu")
    other.preprocessing = {**other.preprocessing, "image_mean": [0.0, 0.0, 0.0]}
    with pytest.raises(UserError, match=r"preprocessing\.image_mean"):
        extract(other, photos, out=tmp_path / "s", **SETTINGS)
    with pytest.raises(UserError, match=r"images\.(fingerprint|n_images)"):
        extract(model, photos.subset(0, 22), out=tmp_path / "s", **SETTINGS)


def test_a_finished_store_is_returned_untouched_whatever_the_batch(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    first = extract(model, photos, out=tmp_path / "s", **SETTINGS)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [first.path, *first.path.rglob("*")]}

    before = times()
    again = extract(model, photos, out=tmp_path / "s", **SETTINGS | {"batch_size": 5})
    assert first.summary is not None and first.summary.images == N_IMAGES
    assert again.summary is None and again.n_images == N_IMAGES
    assert times() == before


def test_the_summary_tells_the_share_of_the_forward_pass(
    model: VisionModel, photos: ImageSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = extract(model, photos, out=tmp_path / "s", **SETTINGS | {"quiet": False})
    assert store.summary is not None
    assert 0 < store.summary.seconds_in_forward < store.summary.seconds
    assert f"23 images in {store.summary.seconds:,.1f} s" in capsys.readouterr().err


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": []}, "sites"),
        ({"sites": BLOCK_0}, "list"),
        ({"sites": ["blocks.7.resid_post"]}, "has no site"),
        ({"tokens": "heads"}, "heads"),
        ({"dtype": "int4"}, "float16, bfloat16, float32"),
        ({"batch_size": 0}, "1 or more"),
        ({"shard_images": 0}, "1 or more"),
        ({"max_failed": 2.0}, "share"),
        ({"out": "s3://bucket/store"}, "local folders"),
    ],
)
def test_settings_out_of_range_are_refused(
    model: VisionModel, photos: ImageSource, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        extract(model, photos, **{"out": tmp_path / "s", **SETTINGS, **change})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "exchanged", "foreign"])
@pytest.mark.parametrize("name", ["00000.parquet", "00001.safetensors"])
def test_a_damaged_journal_of_a_half_written_store_is_named_before_the_model_runs(
    model: VisionModel, tmp_path: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(str(save_photos(tmp_path / "photos", broken=(2, 3, 5))))
    with pytest.raises(SparsightError, match="could not be read"):
        extract(model, images, out=tmp_path / "s", max_failed=0.1, **SETTINGS)
    file = tmp_path / "s" / "journal" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "removed":
        file.unlink()
    elif damage == "exchanged":  # whole, but of another shard or store
        rows = file.with_name("00002.parquet").read_bytes()
        file.write_bytes(rows if file.suffix == ".parquet" else save({"a": torch.ones(1)}))
    else:
        file.write_bytes(b"no journal at all" * 100)
    monkeypatch.setattr(model, "read", None)
    message = rf"journal/{name}: is missing or damaged \(.*extract again"
    with pytest.raises(SparsightError, match=message) as caught:
        extract(model, images, out=tmp_path / "s", max_failed=0.2, **SETTINGS)
    assert not isinstance(caught.value, UserError)
    assert str(caught.value).count(name) == 1


@pytest.mark.parametrize("name", ["00000.parquet", "00001.safetensors"])
def test_a_journal_that_goes_while_the_store_is_closed_is_named(
    model: VisionModel,
    photos: ImageSource,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    close_store = StoreWriter.close_store

    def close(writer: StoreWriter) -> None:
        (writer.folder / "journal" / name).unlink()
        close_store(writer)

    monkeypatch.setattr(StoreWriter, "close_store", close)
    with pytest.raises(SparsightError, match=rf"^[^:]*journal/{name}: is missing or damaged"):
        extract(model, photos, out=tmp_path / "s", **SETTINGS)


def test_a_folder_of_other_things_is_left_alone(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        extract(model, photos, out=tmp_path, **SETTINGS)
    with pytest.raises(UserError, match="is a file"):
        extract(model, photos, out=tmp_path / "thesis.txt", **SETTINGS)
    assert digests(tmp_path).keys() == {"thesis.txt"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_processes_do_not_write_one_store(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    holder = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    (tmp_path / "s").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "s" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"):
            extract(model, photos, out=tmp_path / "s", **SETTINGS)
        other.kill()
    extract(model, photos, out=tmp_path / "s", **SETTINGS).verify()


def test_an_image_whose_label_cannot_be_read_is_recorded_as_failed(
    model: VisionModel, tmp_path: Path
) -> None:
    with_damaged_labels(tmp_path / "x.parquet")
    images = open_images(tmp_path / "x.parquet")
    settings = SETTINGS | {"max_failed": 0.5}
    store = extract(model, images, out=tmp_path / "s", **settings)
    rows = store.images.to_pylist()
    assert [row["status"] == "ok" for row in rows] == [True, True, False, False, True, True]
    assert all("row group 1 is damaged" in row["reason"] for row in rows[2:4])
    assert rows[2]["id"] == f"parquet:{tmp_path}/x.parquet[2]"
    assert [rows[i]["label"] for i in (1, 4)] == ["class 1", "class 4"]
    others = extract(model, images.select([0, 1, 4, 5]), out=tmp_path / "o", **SETTINGS)
    for site in store.sites:
        ours, theirs = everything(store, site), everything(others, site)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    with pytest.raises(SparsightError, match="2 of 6 images could not be read"):
        extract(model, images, out=tmp_path / "strict", **SETTINGS)


def test_an_edited_table_of_labels_does_not_continue_a_store(
    model: VisionModel, tmp_path: Path
) -> None:
    folder = save_photos(tmp_path / "photos", n=4)
    table = folder / "labels.csv"
    table.write_text("file,label\n000.jpg,tom\n")
    extract(model, open_images(folder), out=tmp_path / "s", **SETTINGS)
    table.write_text("file,label\n000.jpg,tim\n")
    with pytest.raises(UserError, match=r"images\.fingerprint"):
        extract(model, open_images(folder), out=tmp_path / "s", **SETTINGS)


@contextmanager
def _files_no_longer_than(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_leaves_the_store_whole(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    expected = extract(model, photos, out=tmp_path / "whole", **SETTINGS)
    with (
        _files_no_longer_than(2000),
        pytest.raises(SparsightError, match=r"shard-00000\.safetensors: could not be written"),
    ):
        extract(model, photos, out=tmp_path / "s", **SETTINGS)
    extract(model, photos, out=tmp_path / "s", **SETTINGS)
    assert digests(tmp_path / "s") == digests(expected.path)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"),
    reason="only root may mount a small disk",
)
def test_a_full_disk_leaves_the_store_whole_and_more_room_continues_it(
    model: VisionModel, photos: ImageSource, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(SparsightError, match="No space left on device"):
            extract(model, photos, out=disk / "s", **SETTINGS | {"dtype": "float32"})
        with pytest.raises(UserError, match="unfinished"):
            ActivationStore(disk / "s")
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        store = extract(model, photos, out=disk / "s", **SETTINGS | {"dtype": "float32"})
        store.verify()
        assert store.n_images == N_IMAGES
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_scaled_jpegs_are_part_of_a_stores_identity_and_their_whole_size_is_recorded(
    clip_folder: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        small = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        large = Image.fromarray(small).resize((1280, 960), Image.Resampling.BICUBIC)
        large.save(photos / f"{i}.jpg", quality=95)
    images = open_images(photos)
    whole, scaled = (
        load_model(str(clip_folder), device="cpu", scale_jpegs=each) for each in (False, True)
    )
    settings: dict[str, Any] = {"sites": [BLOCK_0], "dtype": "float32", "quiet": True}
    stores = [
        extract(model, images, out=tmp_path / name, **settings)
        for name, model in (("whole", whole), ("scaled", scaled))
    ]
    assert "jpeg_min_side" not in stores[0].manifest.preprocessing
    assert stores[1].manifest.preprocessing["jpeg_min_side"] == scaled.min_side
    assert stores[0].fingerprint != stores[1].fingerprint
    for store in stores:
        assert store.images["width"].to_pylist() == [1280] * 3
        assert store.images["height"].to_pylist() == [960] * 3
    one, other = (everything(store, BLOCK_0) for store in stores)
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other, dim=-1).min() > 0.999
    live = LiveActivations(scaled, images, [BLOCK_0], workers=0)
    assert torch.allclose(everything(live, BLOCK_0), other, atol=1e-6)
    with pytest.raises(UserError, match=r"preprocessing\.jpeg_min_side"):
        extract(scaled, images, out=tmp_path / "whole", **settings)


def test_a_short_last_batch_is_not_padded(
    model: VisionModel, photos: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    read = type(model).read

    def counted(self: VisionModel, pixels: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(pixels))
        return read(self, pixels, *rest)

    monkeypatch.setattr(type(model), "read", counted)
    store = extract(
        model, photos, sites=[BLOCK_0], out=tmp_path, batch_size=6, workers=0, quiet=True
    )
    assert sum(seen) == store.n_images
    assert set(seen[:-1]) == {6}
    assert seen[-1] == (store.n_images % 6 or 6)


def test_a_star_stands_for_every_block(model: VisionModel) -> None:
    pattern = ["blocks.0.resid_pre", "blocks.*.resid_post"]
    found = matching_sites(pattern, model.sites, model.canonical_site)
    blocks = [f"blocks.{number}.resid_post" for number in range(model.n_blocks)]
    assert found == ("blocks.0.resid_pre", *blocks)
    with pytest.raises(UserError, match=r"No site fits 'layers.\*'"):
        matching_sites(["layers.*"], model.sites, model.canonical_site)


def test_odd_bytes_and_half_characters_in_names_and_captions_end_no_extraction(
    model: VisionModel, tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 ")
    (folder / os.fsdecode(b"cl\xff")).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / os.fsdecode(b"cl\xff/a\xfe.png"))
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    row = {"file_name": "b.png", "text": "half \ud83d a face,\u2028and a line"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    images = open_images(folder)
    store = extract(model, images, out=tmp_path / "acts", **SETTINGS)
    assert store.images["id"].to_pylist() == ["b.png", "cl\\xff/a\\xfe.png"]
    assert store.images["label"].to_pylist() == [None, "cl\\xff"]
    assert store.images["caption"][0].as_py() == "half \\ud83d a face,\u2028and a line"
    assert ActivationStore(tmp_path / "acts").source().load(1).size == (8, 8)


def fail(image: Image.Image) -> torch.Tensor:
    raise ZeroDivisionError("of a library")


def test_a_transform_that_fails_on_every_image_ends_in_one_clear_error(
    model: VisionModel, photos: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "transform", fail)
    with pytest.raises(SparsightError, match=r"could not be read.*transform failed .ZeroDivision"):
        extract(model, photos, out=tmp_path / "acts", **SETTINGS)
