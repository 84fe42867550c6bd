from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from picture_files import write_picture

from sparsight.errors import UserError
from sparsight.images import ImageInfo, open_images
from sparsight.images.selection import (
    format_selection,
    parse_selection,
    sample_places,
    split_selection,
    stratified_places,
)
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
        ("nowhere[0:9:2]", "nowhere: no such folder"),
        ("nowhere[old]", r"nowhere\[old\]: no such folder"),
        ("calibration:9[0:9:0]", "the step in '0:9:0' must be 1 or more"),
        ("calibration:9[a:b]", r"'a:b' is not a selection. Expected e.g. \[0:100\]"),
        ("calibration:9[1.5]", "'1.5' is not a selection"),
        ("calibration:9[0;3]", "'0;3' is not a selection"),
        ("calibration:9[0:3,]", "'' is not a selection"),
        ("calibration:9[0:1:1:1]", "'0:1:1:1' is not a selection"),
        ("calibration:9[5:10]", "no image 9; it has 9"),
        ("calibration:9[-10]", "no image -1; it has 9"),
        ("calibration:9?sample=0", "sample=0; expected a whole number, 1 or more"),
        ("calibration:9?sample=few", "sample=few; expected a whole number"),
        ("calibration:9?sample=3&seed=-1", "seed=-1; expected a whole number, 0 or more"),
        ("calibration:9?sample=3&sample=4", "sample= is given twice"),
        ("calibration:9?sample=3&by=size", "only by=label is known"),
        ("calibration:9?seed=1", "seed without sample="),
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
    spec, parts = split_selection(f"x{text}")
    assert spec == "x" and parts is not None
    assert parse_selection(parts, int(indices.max()) + 1, "x") == indices.tolist()


def test_selections_are_short_where_they_can_be() -> None:
    assert format_selection(np.arange(100, 100_000)) == "[100:100000]"
    assert format_selection(np.arange(0, 1000, 10)) == "[0:991:10]"
    assert format_selection(np.array([7, 3], dtype=np.int64)) == "[7,3]"
    assert split_selection("x" + format_selection(np.array([], dtype=np.int64))) == ("x", "")
    assert parse_selection("", 3, "x") == []
    assert split_selection("photos") == ("photos", None)


@pytest.mark.parametrize(
    "parts", ["::4", ":3", "-4:", "7:", "2:8:3", "-1", ":", " 0:4 , 9 ", "8,-10", "5:2", "::20"]
)
def test_a_selection_means_what_a_slice_means(parts: str) -> None:
    expected = []
    for part in parts.split(","):
        ends = [int(end) if end.strip() else None for end in part.split(":")]
        chosen = list(range(10))[slice(*ends)] if len(ends) > 1 else [list(range(10))[ends[0]]]
        expected += chosen
    source = open_images(f"calibration:10[{parts}]")
    assert [source.number(i) for i in range(len(source))] == expected
    assert open_images(source.spec).fingerprint() == source.fingerprint()


LABELS = ["cat"] * 50 + ["dog"] * 30 + [None] * 15 + ["owl"] * 5


def test_a_sample_is_drawn_from_all_places_and_grows_with_its_size() -> None:
    few, more = sample_places(10_000, 100, seed=3), sample_places(10_000, 1000, seed=3)
    assert few.tolist() == sorted(set(few)) and set(few) < set(more)
    assert np.histogram(more, 4, (0, 10_000))[0].min() > 200
    assert few.tolist() != sample_places(10_000, 100, seed=4).tolist()
    assert sample_places(5, 9).tolist() == [0, 1, 2, 3, 4]
    # On every machine, in every version of NumPy.
    assert sample_places(100, 5, seed=0).tolist() == [5, 14, 53, 89, 93]


@pytest.mark.parametrize(
    "n, expected", [(20, [10, 6, 3, 1]), (7, [4, 2, 1, 0]), (100, [50, 30, 15, 5])]
)
def test_a_stratified_sample_keeps_the_shares_of_labels(n: int, expected: list[int]) -> None:
    mixed = np.random.default_rng(0).permutation(len(LABELS))
    labels = [LABELS[i] for i in mixed]
    chosen = stratified_places(labels, n, seed=1)
    found = [labels[i] for i in chosen]
    assert [found.count(label) for label in ("cat", "dog", None, "owl")] == expected
    assert chosen.tolist() == sorted(set(chosen))


@pytest.mark.parametrize(
    "spec",
    [
        "calibration:60?sample=9&seed=5",
        "calibration:60?sample=9",
        "calibration:60?seed=5&by=label&sample=9",
        "calibration:60[::2]?sample=9[0:4]",
        "calibration:60?sample=9&seed=5[::2]?sample=3&seed=1",
        "written:attacked?of=calibration%3A60&seed=2&sample=9&by=label",
        "written:attacked?of=calibration%3A60%3Fsample%3D9&seed=2",
    ],
)
def test_the_spec_of_a_sample_opens_it_again_and_views_of_it(spec: str) -> None:
    source = open_images(spec)
    for view in (source, source.select([2, 0]), source.select([2, 0, 1]).select([1, 2])):
        again = open_images(view.spec)
        assert (again.spec, again.fingerprint()) == (view.spec, view.fingerprint())
        assert [again.info(i) for i in range(len(again))] == [
            view.info(i) for i in range(len(view))
        ]
        assert again.scene(0).label == view.info(0).label  # the truth stays within reach
        assert again.world is not None and again.render(0).image.shape[2] == 3


def test_a_sample_stands_beside_a_table_and_of_all_there_is(tmp_path: Path) -> None:
    for i in range(6):
        write_picture(tmp_path / "photos" / f"{i}.png", seed=i)
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(6))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    spec = f"{tmp_path}/photos?table={tmp_path}/labels.csv&sample=4&by=label&seed=1"
    source = open_images(spec)
    assert source.spec == spec and len(source) == 4
    assert [source.info(i).label for i in range(4)].count("a") == 2
    other = f"{tmp_path}/photos?sample=4&by=label&seed=1&table={tmp_path}/labels.csv"
    assert open_images(other).fingerprint() == source.fingerprint()
    everything = open_images(f"{tmp_path}/photos?sample=9")
    assert everything.spec == str(tmp_path / "photos")
    assert everything.notes == ("A sample of 9 was asked for; all 6 images are taken.",)


def test_folders_with_odd_names_open_as_they_are(tmp_path: Path) -> None:
    for name in ("photos ", " x", "a?sample=2", "calibration", "b[0:1]", os.fsdecode(b"caf\xe9")):
        write_picture(tmp_path / name / "a.png")
        for given in (tmp_path / name, str(tmp_path / name)):
            source = open_images(given)
            source.spec.encode()
            assert (len(source), source.folder) == (1, tmp_path / name)
            assert open_images(source.spec).folder == tmp_path / name
            assert open_images(source.select([0]).spec).load(0).size == (32, 24)
    write_picture(tmp_path / "plain" / "a.png")
    assert len(open_images(f"  {tmp_path}/plain \n")) == 1


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    with pytest.raises(UserError, match="ascending range"):
        expand_braces("{5..1}")
    with pytest.raises(UserError, match="more than 100,000"):
        expand_braces("{0..99999}{0..99999}")


def test_the_caption_of_an_image_is_the_first_of_its_captions() -> None:
    assert ImageInfo("a", "a", captions=("x", "y")).caption == "x"
    assert ImageInfo("a", "a", caption="x").captions == ("x",)
    with pytest.raises(ValueError):
        ImageInfo("a", "a", caption="x", captions=("y",))
