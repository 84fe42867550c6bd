"""All latents of one image, and an index as Parquet files, against dense codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latent_parts import TensorActivations, make_sae, save_clip
from sparsight.errors import UserError
from sparsight.latents import LatentIndex, build_index, encode
from sparsight.latents.export import export_index
from sparsight.latents.one_image import image_latents
from sparsight.latents.run_files import RunFiles
from sparsight.latents.stored import find_stored
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model


@pytest.fixture(scope="module")
def index(
    tmp_path_factory: pytest.TempPathFactory,
    sae: SparseAutoencoder,
    activations: TensorActivations,
) -> LatentIndex:
    return build_index(sae, activations, out=tmp_path_factory.mktemp("run") / "index", quiet=True)


@pytest.fixture(scope="module")
def dense(sae: SparseAutoencoder, activations: TensorActivations) -> torch.Tensor:
    """Activations: images × positions × latents."""
    code = sae.encode(activations.x.flatten(0, 1)).dense()
    return code.view(*activations.x.shape[:2], -1)


def test_an_image_lists_its_latents_from_posting_lists_and_from_its_code(
    index: LatentIndex,
    sae: SparseAutoencoder,
    activations: TensorActivations,
    dense: torch.Tensor,
) -> None:
    for place in (0, 17, 35):
        strongest, first = dense[place].max(0)
        for code in (None, sae.encode(activations.x[place])):
            found = image_latents(index, place, code=code)
            assert set(found.latents.tolist()) == set(strongest.nonzero().flatten().tolist())
            assert found.activations.tolist() == strongest[found.latents].tolist()
            assert (np.diff(found.activations) <= 0).all()
            assert found.positions.tolist() == first[found.latents].tolist()
    row = found.table.to_pylist()[0]
    assert row["relative"] == pytest.approx(row["activation"] / row["max_activation"])
    assert found.info == index.info(35) and f"{len(found)} latents" in repr(found)
    assert image_latents(index, found.info.id).latents.tolist() == found.latents.tolist()
    assert found._repr_html_().count("<tr>") == 21


def test_a_photo_has_the_latents_of_its_image_in_the_collection(
    index: LatentIndex, sae: SparseAutoencoder, model: VisionModel, pictures: Path
) -> None:
    known = image_latents(index, 7)
    path = pictures / index.info(7).id
    for photo in (path, str(path), index.picture(7), 7):
        found = image_latents(index, photo, sae=sae, model=model)
        assert found.image == (7 if photo == 7 else None)
        np.testing.assert_array_equal(found.latents, known.latents)
        np.testing.assert_allclose(found.activations, known.activations, rtol=1e-4)
        np.testing.assert_array_equal(found.positions, known.positions)


def test_patches_have_the_latents_of_their_rows_of_the_code(
    index: LatentIndex, sae: SparseAutoencoder, model: VisionModel, dense: torch.Tensor
) -> None:
    found = image_latents(index, 3, sae=sae, model=model)
    patches = found.patches(2)
    assert [(patch.row, patch.column) for patch in patches] == [
        (row, column) for row in range(4) for column in range(4)
    ]
    for number, patch in enumerate(patches):
        values, latents = dense[3, 1 + number].sort(descending=True)
        assert patch.latents == tuple(latents[:2].tolist())
        assert patch.activations == pytest.approx(values[:2].tolist(), rel=1e-4)
    assert (found.patch_at(0), found.patch_at(1), found.patch_at(16)) == (None, (0, 0), (3, 3))
    with pytest.raises(UserError, match="need the image's code"):
        image_latents(index, 3).patches()
    with pytest.raises(UserError, match="has no patches"):
        image_latents(replace(index, manifest=index.manifest | {"tokens": "cls"}), 3).patches()


def test_the_code_of_an_image_comes_from_codes_on_disk(
    index: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    run = index.folder.parent
    sae.save_pretrained(run)
    encode(sae, activations, out=run / "codes", quiet=True)
    stored = find_stored(RunFiles(run, "run", sae, index=index))
    assert stored is not None
    code = stored.code(9)
    assert torch.equal(code.dense(), sae.encode(activations.x[9]).dense())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (36, "no image 36"),
        ("nothing.png", "neither the id of an image"),
        (Path("nothing.png"), "outside the collection needs an SAE"),
    ],
)
def test_an_image_that_does_not_exist_gives_one_clear_line(
    index: LatentIndex, image: int | str | Path, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        image_latents(index, image)


def test_parts_that_belong_to_something_else_are_refused(
    index: LatentIndex,
    sae: SparseAutoencoder,
    model: VisionModel,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="Give both"):
        image_latents(index, 1, sae=sae)
    with pytest.raises(UserError, match="built from another SAE"):
        image_latents(index, 1, sae=make_sae(k=5, n_latents=80), model=model)
    with pytest.raises(UserError, match="this image file does not exist"):
        image_latents(index, Path("nothing.png"), sae=sae, model=model)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image"):
        image_latents(index, tmp_path / "broken.png", sae=sae, model=model)
    other = load_model(str(save_clip(tmp_path / "clip")), device="cpu")
    known = index.manifest["model"] | {"weights_hash": "0" * 64}
    elsewhere = replace(index, manifest=index.manifest | {"model": known})
    with pytest.raises(UserError, match="built with another model"):
        image_latents(elsewhere, 1, sae=sae, model=other)
    old = replace(index, manifest=index.manifest | {"version": 1})
    with pytest.raises(UserError, match="--upgrade"):
        image_latents(old, 1)


def test_parquet_files_hold_the_whole_index(
    index: LatentIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.latents.export.ROW_GROUP", 100)
    out = export_index(index, tmp_path / "sql", quiet=True)
    table = pq.read_table(out / "postings.parquet")
    lists = index.by_latent
    rows = [
        (latent, image, value)
        for latent in range(index.n_latents)
        for image, value in zip(*(part.tolist() for part in lists.row(latent)), strict=True)
    ]
    columns = (table[name].to_pylist() for name in ("latent", "image", "activation"))
    assert list(zip(*columns, strict=True)) == rows and len(rows) > 500
    assert table["token"].to_pylist() == lists.tokens.tolist()
    file = pq.ParquetFile(out / "postings.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [100] * (len(rows) // 100) + [len(rows) % 100]
    assert pq.read_table(out / "latents.parquet").equals(index.table)
    assert pq.read_table(out / "images.parquet").equals(index.images)
    found = pq.read_table(
        out / "postings.parquet", filters=[("latent", "=", 4), ("activation", ">", 0.5)]
    )
    assert found["image"].to_pylist() == index.query("4 > .5").places.tolist()


def test_an_export_never_overwrites_an_index(index: LatentIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an index"):
        export_index(index, index.folder)
    assert LatentIndex.open(index.folder).table.equals(index.table)
