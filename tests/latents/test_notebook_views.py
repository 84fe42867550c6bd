"""What notebooks show of an index, a run, codes and figures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from latent_parts import EVIL, TensorActivations, make_run
from sparsight.errors import UserError
from sparsight.latents import CodeStore, LatentIndex, encode, plots, show_latent
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    sae: SparseAutoencoder,
    activations: TensorActivations,
) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", sae, activations)


@pytest.fixture(scope="module")
def index(run: Path) -> LatentIndex:
    return LatentIndex.open(run)


def strongest(index: LatentIndex) -> int:
    return int(index.to_pandas()["n_active_images"].idxmax())


def test_a_strip_shows_the_strongest_images_in_html_and_as_a_png(
    index: LatentIndex, tmp_path: Path
) -> None:
    latent = strongest(index)
    strip = show_latent(index, latent, 3)
    assert [each.activation for each in strip.images] == [
        example.activation for example in index.top(latent)[:3]
    ]
    page = strip._repr_html_()
    assert page.count("<img ") == 3 and "http" not in page
    image = Image.open(strip.save(tmp_path / "strip.png"))
    assert image.size == (3 * 128 + 2 * 4, 128)
    assert np.asarray(image).std() > 10


def test_a_strip_escapes_names_and_is_empty_for_a_latent_that_never_fired(
    index: LatentIndex,
) -> None:
    table = index.to_pandas()
    named = int(table.index[table["name"] == EVIL][0])
    assert EVIL not in show_latent(index, named)._repr_html_()
    assert "&lt;script&gt;" in show_latent(index, named)._repr_html_()
    silent = int(table.index[table["n_active"] == 0][0])
    strip = show_latent(index, silent)
    assert not strip.images and "never active" in repr(strip)
    assert Image.open(io.BytesIO(strip._repr_png_())).height == 128


def test_with_the_model_a_strip_is_dark_where_the_latent_is_not_active(
    index: LatentIndex, sae: SparseAutoencoder, model: VisionModel
) -> None:
    latent = strongest(index)
    plain = show_latent(index, latent, 2).picture()
    heat = show_latent(index, latent, 2, sae=sae, model=model).picture()
    assert np.asarray(heat).mean() < np.asarray(plain).mean() - 5
    with pytest.raises(UserError, match="both sae and model"):
        show_latent(index, latent, sae=sae)
    with pytest.raises(UserError, match="no latent 96"):
        show_latent(index, 96)


def test_every_plot_of_the_report_is_a_figure_on_white_that_a_notebook_shows(
    run: Path, index: LatentIndex
) -> None:
    drawn = [
        plots.training_curves(run),
        plots.error_by_position(run),
        plots.density_histogram(index),
        plots.density_scatter(run),
    ]
    for figure in drawn:
        assert isinstance(figure, Figure)
        png = Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")
        assert png.getpixel((0, 0)) == (255, 255, 255)


def test_a_plot_without_data_names_the_command_that_makes_it(
    tmp_path: Path, sae: SparseAutoencoder
) -> None:
    folder = sae.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="sparsight train"):
        plots.training_curves(folder)
    with pytest.raises(UserError, match="sparsight evaluate"):
        plots.error_by_position(folder)
    with pytest.raises(UserError, match="sparsight index"):
        plots.density_histogram(folder)
    with pytest.raises(UserError, match="compare"):
        plots.pareto(tmp_path)
    with pytest.raises(UserError, match="known: fvu, accuracy"):
        plots.pareto(tmp_path, "loss")


def test_codes_are_one_row_per_active_latent(
    sae: SparseAutoencoder, activations: TensorActivations, tmp_path: Path
) -> None:
    codes: CodeStore = encode(sae, activations, out=tmp_path / "codes", quiet=True)
    frame = codes.to_pandas()
    assert len(frame) == codes.n_active
    assert list(frame.columns) == ["image", "token", "latent", "activation"]
    image = int(codes.image_indices[1])
    own = frame[frame["image"] == image].reset_index(drop=True)
    assert own.equals(codes.to_pandas([image]))
    row = own.iloc[0]
    dense = codes.image(image).dense()
    assert dense[int(row["token"]), int(row["latent"])].item() == row["activation"]
    assert codes.to_pandas([]).empty


def test_an_sae_shows_the_fvu_in_its_folder(run: Path, sae: SparseAutoencoder) -> None:
    assert "FVU" not in repr(sae)
    assert "FVU: 0.0834 (measured)" in repr(SparseAutoencoder.from_pretrained(run))
    path = run / "metrics.json"
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "sae": "of another"}))
    loaded = SparseAutoencoder.from_pretrained(run)
    path.write_text("{")  # damaged
    try:
        assert "FVU: 0.125 (in training)" in repr(loaded)
        assert "FVU" not in repr(loaded.requires_grad_(True))
    finally:
        path.write_text(kept)
