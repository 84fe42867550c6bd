from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from picture_files import write_picture

from sparsight.errors import UserError
from sparsight.images import ImageInfo, open_images
from sparsight.images.selection import format_selection, split_selection
from sparsight.images.tar_shards import expand_braces


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nowhere/at/all", "no such folder, and no other kind of source. Expected a folder"),
        ("", "No images named"),
        ("webdataset:", "nothing after 'webdataset'"),
        ("webdataset:none-{000..003}.tar", r"none-000.tar: no such shard \(4 of 4"),
        ("webdataset:https://host/x.tar", "download them first"),
        ("parquet:none.parquet", "no such Parquet file"),
        ("calibration:many", "expected 'calibration', 'calibration:N'"),
        ("calibration:0", "must be 1 or more"),
        ("nowhere[0:9:0]", "step must be 1 or more"),
    ],
)
def test_a_spec_that_opens_nothing_says_what_to_do(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_images(spec)


def test_folders_of_other_things_say_how_to_open_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no images.*found no files"):
        open_images(tmp_path)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match="'parquet:"):
        open_images(tmp_path)
    (tmp_path / "x.parquet").rename(tmp_path / "x.tar")
    with pytest.raises(UserError, match="'webdataset:"):
        open_images(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(UserError, match="'hf:"):
        open_images(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        open_images(tmp_path / "dataset_info.json")


def test_a_folder_whose_name_looks_like_a_selection_is_a_folder(tmp_path: Path) -> None:
    write_picture(tmp_path / "run[0:2]" / "a.png")
    assert len(open_images(tmp_path / "run[0:2]")) == 1


def test_an_open_source_is_given_back(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    source = open_images(tmp_path)
    assert open_images(source) is source
    with pytest.raises(UserError, match="table="):
        open_images(source, table="x.csv")


def test_a_table_beside_shards_is_refused() -> None:
    with pytest.raises(UserError, match="table= goes with a folder"):
        open_images("webdataset:x.tar", table="labels.csv")


@pytest.mark.parametrize("seed", range(8))
def test_any_selection_survives_being_written_and_read(seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [
        start + np.arange(length) * step
        for start, length, step in random.integers(1, 200, (12, 3)) % [1000, 90, 5]
    ]
    indices = np.concatenate(parts).astype(np.int64)
    text = format_selection(indices)
    assert split_selection(f"x{text}") == ("x", indices.tolist())


def test_selections_are_short_where_they_can_be() -> None:
    assert format_selection(np.arange(100, 100_000)) == "[100:100000]"
    assert format_selection(np.arange(0, 1000, 10)) == "[0:991:10]"
    assert format_selection(np.array([7, 3], dtype=np.int64)) == "[7,3]"
    assert split_selection("x" + format_selection(np.array([], dtype=np.int64))) == ("x", [])
    assert split_selection("photos") == ("photos", None)


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    with pytest.raises(UserError, match="rising range"):
        expand_braces("{5..1}")
    with pytest.raises(UserError, match="more than 100,000"):
        expand_braces("{0..99999}{0..99999}")


def test_the_caption_of_an_image_is_the_first_of_its_captions() -> None:
    assert ImageInfo("a", "a", captions=("x", "y")).caption == "x"
    assert ImageInfo("a", "a", caption="x").captions == ("x",)
    with pytest.raises(ValueError):
        ImageInfo("a", "a", caption="x", captions=("y",))
