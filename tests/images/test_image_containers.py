from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_files import encoded, picture, pixels, with_damaged_labels, write_picture

from sparsight.errors import MissingExtra, UserError
from sparsight.images import ImageError, ImageSource, decoding, open_images, parquet, sidecars

N = 6


def same_pictures(source: ImageSource) -> bool:
    order = [5, 0, 3, 3, 1, 4, 2]
    return all((pixels(source.load(i)) == pixels(picture(i))).all() for i in order)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"s-{shard:03d}.tar")) as writer:
            for i in range(shard * 3, shard * 3 + 3):
                writer.write(
                    {
                        "__key__": f"part.d/{i:04d}",
                        "png": encoded(picture(i), "PNG"),
                        "cls": i % 2,
                        "txt": f"picture {i}",
                        "json": {"label": "from json", "other": 1},
                    }
                )
    return folder


def test_shards_give_images_labels_and_captions_in_any_order(shards: Path) -> None:
    source = open_images(f"webdataset:{shards}/s-{{000..001}}.tar")
    assert len(source) == N
    assert same_pictures(source)
    info = source.info(4)
    assert (info.id, info.label, info.caption) == ("s-001.tar/part.d/0004", "0", "picture 4")
    assert source.labels() == ["0", "1"]
    assert same_pictures(pickle.loads(pickle.dumps(source)))
    for other in (f"webdataset:{shards}", f"webdataset:{shards}/s-*.tar", source.spec):
        assert open_images(other).fingerprint() == source.fingerprint()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


def outcomes(source: ImageSource) -> dict[str, str]:
    found = {}
    for index in range(len(source)):
        try:
            source.load(index)
            found[source.info(index).id] = "ok"
        except ImageError as error:
            found[source.info(index).id] = error.reason
    return found


def test_a_shard_cut_at_any_byte_gives_what_is_whole_and_one_failure(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    write_tar(whole, [(f"{i}.png", encoded(picture(i), "PNG")) for i in range(3)])
    data = whole.read_bytes()
    with tarfile.open(whole) as archive:
        ends = [member.offset_data + member.size for member in archive]
        end_of_members = archive.offset
    cut_shard = tmp_path / "cut.tar"
    for cut in [*range(ends[0] + 1, end_of_members, 397), end_of_members]:
        cut_shard.write_bytes(data[:cut])
        found = outcomes(open_images(cut_shard))
        readable = sum(reason == "ok" for reason in found.values())
        assert readable == sum(end <= cut for end in ends)
        failures = [reason for reason in found.values() if reason != "ok"]
        assert len(failures) == 1
        assert "cut off" in failures[0] or "damaged" in failures[0]


def test_a_spoilt_header_does_not_hide_the_rest_silently(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    write_tar(shard, [(f"{i}.png", encoded(picture(i), "PNG")) for i in range(3)])
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[1].offset
    data = bytearray(shard.read_bytes())
    data[place + 5] ^= 0xFF
    shard.write_bytes(data)
    found = outcomes(open_images(shard))
    assert found["x.tar/0"] == "ok"
    assert f"damaged at byte {place:,}" in found["x.tar/(damaged)"]


def test_joined_tar_files_are_not_half_read_silently(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encoded(picture(), "PNG"))])
    joined = tmp_path / "joined.tar"
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert "joined tar files?" in outcomes(open_images(joined))["joined.tar/(damaged)"]


def test_ids_stay_unique_when_a_key_comes_twice(tmp_path: Path) -> None:
    one = encoded(picture(), "PNG")
    write_tar(tmp_path / "x.tar", [(f"{key}.png", one) for key in ("a~2", "a", "b", "a", "b")])
    source = open_images(tmp_path / "x.tar")
    found = [source.info(i).id.removeprefix("x.tar/") for i in range(5)]
    assert found == ["a~2", "a", "b", "a~3", "b~2"]


def captions_by_id(source: ImageSource) -> dict[str, tuple[str, ...]]:
    infos = [source.info(i) for i in range(len(source))]
    return {info.id.partition("/")[2]: info.captions for info in infos}


def test_images_whose_names_hold_dots_are_images_of_their_own(tmp_path: Path) -> None:
    members = []
    for i in range(3):
        members += [(f"v1.{i}.png", encoded(picture(i), "PNG")), (f"v1.{i}.txt", b"caption %d" % i)]
    write_tar(tmp_path / "x.tar", [*members, ("w.0.png", members[0][1]), ("w.0.txt", b"one")])
    source = open_images(tmp_path / "x.tar")
    expected = {f"v1.{i}": (f"caption {i}",) for i in range(3)}
    assert captions_by_id(source) == expected | {"w": ("one",)}
    assert all((pixels(source.load(i)) == pixels(picture(i))).all() for i in range(3))
    assert source.notes == (
        "1 samples hold several images with dots in their names; each counts as an image of its "
        "own.",
    )


def test_of_several_images_in_a_sample_the_plainest_is_taken_and_the_rest_is_counted(
    tmp_path: Path,
) -> None:
    members = [
        ("0.depth.png", encoded(picture(9), "PNG")),
        ("0.png", encoded(picture(0), "PNG")),
        ("0.txt", b"plain"),
        ("1.png", encoded(picture(1), "PNG")),
        ("1.webp", encoded(picture(9), "WEBP")),
        ("2.png", encoded(picture(2), "PNG")),
        ("2.b.png", encoded(picture(3), "PNG")),
        ("2.b.txt", b"its own"),
    ]
    write_tar(tmp_path / "x.tar", members)
    source = open_images(tmp_path / "x.tar")
    assert captions_by_id(source) == {"0": ("plain",), "1": (), "2": (), "2.b": ("its own",)}
    assert all((pixels(source.load(i)) == pixels(picture(i))).all() for i in range(4))
    assert source.notes[0] == (
        "2 images are left out, because their sample holds a plainer one (depth.png ×1, webp ×1)."
    )


def test_unreadable_shards_among_others_are_failures_that_are_noted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", encoded(picture(), "PNG")), ("._a.png", b"macOS")])
    (tmp_path / "._a.tar").write_bytes(b"macOS")
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    write_tar(tmp_path / "d.tar", [])
    for spec in (f"webdataset:{tmp_path}", f"webdataset:{tmp_path}/*.tar"):
        source = open_images(spec)
        found = outcomes(source)
        assert found.pop("a.tar/a") == "ok"
        assert {id_: "cannot be read as a tar file" in why for id_, why in found.items()} == {
            "b.tar/(damaged)": True,
            "c.tar/(damaged)": True,
        }
        assert source.notes[0] == "1 hidden images (.…) are left out."
        assert source.notes[1].startswith("2 shards cannot be read; each counts as one failed")


def test_members_that_are_links_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded(picture(), "PNG"))])
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    assert open_images(tmp_path / "x.tar").notes == (
        "1 members of the shards are links and left out.",
    )


@pytest.mark.parametrize("text", ["None", "null", "-1", "NaN", " ", "-1.0", "<NA>"])
def test_what_means_no_label_is_none_in_every_container(tmp_path: Path, text: str) -> None:
    data = encoded(picture(), "PNG")
    write_tar(tmp_path / "x.tar", [("a.png", data), ("a.cls", text.encode())])
    pq.write_table(
        pa.table({"image": [data, data], "label": [text, "cat"]}), tmp_path / "x.parquet"
    )
    for name in ("x.tar", "x.parquet"):
        source = open_images(tmp_path / name)
        assert source.info(0).label is None
        assert source.labels() == ["cat"] * (name == "x.parquet")


@pytest.mark.parametrize("values", [[0, -1, None], [0.0, float("nan"), -1.0]])
def test_numbers_with_gaps_are_labels_and_no_label(tmp_path: Path, values: list[object]) -> None:
    table = pa.table({"image": [encoded(picture(), "PNG")] * 3, "label": values})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_images(tmp_path / "x.parquet")
    assert [source.info(i).label for i in range(3)] == ["0", None, None]
    assert source.labels() == ["0"]


def test_samples_without_an_image_are_noted_and_a_broken_sidecar_warns(tmp_path: Path) -> None:
    members = [("a.png", encoded(picture(), "PNG")), ("a.json", b"{"), ("b.txt", b"alone")]
    write_tar(tmp_path / "x.tar", members)
    source = open_images(tmp_path / "x.tar")
    assert len(source) == 1
    assert source.notes == ("1 samples of the shards hold no image.",)
    with pytest.warns(UserWarning, match=r"x.tar/a: its .json is not a JSON object"):
        assert source.info(0).label is None


def test_a_compressed_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded(picture(), "PNG"))])
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(UserError, match="compressed"):
        open_images(packed)
    packed.write_text("no tar" * 500)
    with pytest.raises(UserError, match="Expected a plain tar"):
        open_images(packed)
    packed.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        open_images(packed)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_gives_images_by_row_group(tmp_path: Path, struct: bool) -> None:
    cells = [encoded(picture(i), "PNG") for i in range(N)]
    for number, rows in enumerate([range(4), range(4, N)]):
        table = pa.table(
            {
                "image": [{"bytes": cells[i], "path": "x"} if struct else cells[i] for i in rows],
                "label": [f"class {i % 2}" for i in rows],
                "captions": [[f"a {i}", f"b {i}"] for i in rows],
            }
        )  # fmt: skip
        pq.write_table(table, tmp_path / f"p-{number}.parquet", row_group_size=3)
    source = open_images(f"parquet:{tmp_path}")
    assert len(source) == N and same_pictures(source)
    assert source.info(5).id == "p-1.parquet/000001"
    assert source.info(3).id == "p-0.parquet/000003"
    assert (source.info(5).label, source.info(5).captions) == ("class 1", ("a 5", "b 5"))
    assert source.labels() == ["class 0", "class 1"]
    assert same_pictures(pickle.loads(pickle.dumps(source)))
    assert len(open_images(tmp_path / "p-1.parquet")) == 2


def test_parquet_cells_without_an_image_fail_alone(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": "x.png"}, None, {"bytes": b"junk", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "x.parquet")
    reasons = list(outcomes(open_images(tmp_path / "x.parquet")).values())
    assert reasons[:2] == ["the table holds only the path 'x.png'", "the cell is empty"]
    assert "known format" in reasons[2]


def test_a_damaged_row_group_fails_its_images_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    cells = [encoded(picture(i), "PNG") for i in range(4)]
    pq.write_table(pa.table({"image": cells}), path, row_group_size=2, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    reasons = list(outcomes(open_images(path)).values())
    assert reasons[:2] == ["ok", "ok"]
    assert all("row group 1 is damaged" in reason for reason in reasons[2:])


def test_a_huge_row_group_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    cells = [encoded(picture(i), "PNG") for i in range(20)]
    pq.write_table(pa.table({"image": cells}), path)
    monkeypatch.setattr(parquet, "PART_BYTES", sum(map(len, cells)) // 7)
    source = open_images(path)
    for i in [*range(20), 3, 19, 18, 0, 0, 7, 12, 11]:
        assert (pixels(source.load(i)) == pixels(picture(i))).all()
        assert all(len(part.cells) <= 3 for part in source._parts)
        assert len(source._parts) <= parquet.CACHED_PARTS


def test_in_order_each_part_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    cells = [encoded(picture(i), "PNG") for i in range(20)]
    pq.write_table(pa.table({"image": cells}), path, row_group_size=10)
    monkeypatch.setattr(parquet, "PART_BYTES", 1)
    source = open_images(path)
    started = []
    batches = source._batches
    monkeypatch.setattr(source, "_batches", lambda group: started.append(group) or batches(group))
    for i in range(20):
        source.load(i)
    assert started == [0, 1]


def test_damage_inside_a_row_group_fails_what_lies_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    cells = [encoded(picture(i), "PNG") for i in range(20)]
    pq.write_table(
        pa.table({"image": cells}), path, data_page_size=1, write_batch_size=1,
        use_dictionary=False, compression="zstd",
    )  # fmt: skip
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    monkeypatch.setattr(parquet, "PART_BYTES", 1)
    source = open_images(path)
    reasons = list(outcomes(source).values())
    n_good = reasons.count("ok")
    assert 5 <= n_good < 15
    assert reasons[:n_good] == ["ok"] * n_good
    assert all("row group 0 is damaged" in reason for reason in reasons[n_good:])
    assert (pixels(source.load(0)) == pixels(picture(0))).all()


def test_damaged_labels_fail_their_images_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with_damaged_labels(path)
    source = open_images(path)
    assert source.info(1).label == "class 1"
    for index in (2, 3):
        with pytest.raises(ImageError, match="row group 1 is damaged"):
            source.info(index)
    with pytest.raises(ImageError, match="row group 1 is damaged"):
        source.labels()
    assert source.info(4).label == "class 4"
    assert same_pictures(source)


def test_images_over_the_size_limit_fail_alone_in_every_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [encoded(picture(i), "PNG") for i in range(3)]
    cells[1] += bytes(10_000)
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    write_tar(tmp_path / "x.tar", [(f"{i}.png", cell) for i, cell in enumerate(cells)])
    monkeypatch.setattr(decoding, "MAX_BYTES", 10_000)
    for name in ("x.parquet", "x.tar"):
        reasons = list(outcomes(open_images(tmp_path / name)).values())
        assert reasons == ["ok", f"{len(cells[1]):,} bytes are over the limit of 10,000", "ok"]


def test_a_member_over_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    size = decoding.MAX_BYTES + 1
    header = tarfile.TarInfo("a.png")
    header.size = size
    with path.open("wb") as file:  # sparse: takes no room
        file.write(header.tobuf())
        file.truncate(512 + -(-size // 512) * 512 + 1024)
    source = open_images(path)
    monkeypatch.setattr(source, "_read", lambda *_: pytest.fail("was read"))
    with pytest.raises(ImageError, match="over the limit of 268,435,456"):
        source.load(0)


@pytest.mark.parametrize("ending", ["cls", "txt", "json"])
def test_a_sidecar_over_the_limit_is_left_out_with_a_warning(tmp_path: Path, ending: str) -> None:
    one = encoded(picture(), "PNG")
    huge = b"x" * (sidecars.MAX_SIDECAR_BYTES + 1)
    members = [("a.png", one), (f"a.{ending}", huge), ("b.png", one), ("b.cls", b"7")]
    write_tar(tmp_path / "x.tar", members)
    source = open_images(tmp_path / "x.tar")
    message = rf"x.tar/a: its .{ending} of 1,048,577 bytes is over the limit of 1,048,576"
    with pytest.warns(UserWarning, match=message):
        info = source.info(0)
    assert (info.label, info.captions) == (None, ())
    assert source.info(1).label == "7"
    assert outcomes(source.select([1])) == {"x.tar/b": "ok"}
    source.load(0)


def test_large_members_that_are_no_sidecars_are_nothing_to_warn_of(tmp_path: Path) -> None:
    members = [("a.png", encoded(picture(), "PNG")), ("a.npy", bytes(2**21)), ("a.cls", b"3")]
    write_tar(tmp_path / "x.tar", members)
    assert open_images(tmp_path / "x.tar").info(0).label == "3"


def test_a_shard_that_goes_away_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded(picture(), "PNG")), ("a.cls", b"3")])
    source = open_images(tmp_path / "x.tar")
    (tmp_path / "x.tar").unlink()
    for read in (source.load, source.info):
        with pytest.raises(ImageError, match="its shard cannot be read"):
            read(0)


def test_parquet_files_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no .parquet files"):
        open_images(f"parquet:{tmp_path}")
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match=r"no column of images.*found a \(int64\)"):
        open_images(path)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_images(path)


def test_parquet_files_with_different_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: has the columns image, label, unlike"):
        open_images(f"parquet:{tmp_path}")


def test_parts_of_a_parquet_set_may_differ_where_their_values_go_together(tmp_path: Path) -> None:
    data = [encoded(picture(i), "PNG") for i in range(4)]
    tables = [
        {"jpg": pa.array([None], pa.null()), "caption": ["a"], "label": pa.array([1], pa.int32())},
        {"label": pa.array([2.0]), "jpg": data[1:2], "caption": pa.array([None], pa.null())},
        {
            "jpg": pa.array(data[2:3], pa.large_binary()),
            "caption": pa.array(["c"]).dictionary_encode(),
            "label": pa.array([None], pa.null()),
        },
        {"jpg": data[3:], "caption": pa.array(["d"], pa.large_string()), "label": [3]},
    ]
    (tmp_path / ".hidden").mkdir()
    for i, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"{i}.parquet")
    (tmp_path / "._0.parquet").write_bytes(b"macOS")
    (tmp_path / ".hidden" / "x.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "3.parquet").read_bytes()[:-9])
    source = open_images(f"parquet:{tmp_path}")
    found = [(source.info(i).caption, source.info(i).label) for i in range(5)]
    assert found == [("a", "1"), (None, "2"), ("c", None), ("d", "3"), (None, None)]
    assert source.labels() == ["1", "2", "3"]
    reasons = list(outcomes(source).values())
    assert reasons[:4] == ["the cell is empty", "ok", "ok", "ok"]
    assert "cut.parquet: cannot be read as Parquet" in reasons[4]
    assert source.notes[0] == "2 hidden .parquet files are left out."
    assert source.notes[1].startswith("1 of 5 files cannot be read; each counts as one failed")
    assert len(pickle.loads(pickle.dumps(source))) == 5


def test_parts_of_a_parquet_set_whose_labels_differ_in_kind_are_refused(tmp_path: Path) -> None:
    for name, label in (("a", 1), ("b", "cat")):
        pq.write_table(pa.table({"image": [b"x"], "label": [label]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b.parquet: the column 'label' holds string, .* int64"):
        open_images(f"parquet:{tmp_path}")


def test_class_names_are_those_of_each_part(tmp_path: Path) -> None:
    for name, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"image": [encoded(picture(), "PNG")], "label": [0]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = open_images(f"parquet:{tmp_path}")
    assert [source.info(i).label for i in range(2)] == ["cat", "dog"] == source.labels()
    assert source.notes == (
        "The files name their classes differently; each file uses its own names.",
    )


def not_utf8(values: list[bytes]) -> pa.Array:
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def test_text_that_is_not_utf8_is_escaped_and_noted(tmp_path: Path) -> None:
    data = [encoded(picture(i), "PNG") for i in range(2)]
    texts = not_utf8([b"caf\xe9", b"tea"])
    pq.write_table(
        pa.table({"image": data, "caption": texts, "label": texts}), tmp_path / "x.parquet"
    )
    source = open_images(tmp_path / "x.parquet")
    with pytest.warns(UserWarning, match="holds text that is not UTF-8"):
        assert source.info(0).caption == "caf\\xe9"
    assert source.labels() == ["caf\\xe9", "tea"]
    pq.write_table(
        pa.table({"image": data, "caption": pa.array([b"a", b"b"])}), tmp_path / "y.parquet"
    )
    assert open_images(tmp_path / "y.parquet").info(1).caption == "b"
    name = os.fsdecode(b"caf\xe9.png")
    write_tar(tmp_path / "x.tar", [(name, data[0]), (name[:-3] + "txt", b"caf\xe9")])
    info = open_images(tmp_path / "x.tar").info(0)
    assert (info.id, info.caption) == ("x.tar/caf\\xe9", "caf\\xe9")


@pytest.fixture
def hugging_face() -> object:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "caption": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": encoded(picture(i), "PNG"), "path": None} for i in range(N)],
        "label": [i % 2 for i in range(N)],
        "caption": [f"picture {i}" for i in range(N)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def check_hugging_face(source: ImageSource) -> None:
    assert len(source) == N and same_pictures(source)
    assert (source.info(3).label, source.info(3).caption) == ("dog", "picture 3")
    assert source.labels() == ["cat", "dog"]
    again = pickle.loads(pickle.dumps(open_images(source.spec)))
    assert same_pictures(again)
    assert again.fingerprint() == source.fingerprint()
    assert again.info(2) == source.info(2)


def test_a_saved_hugging_face_data_set_opens(hugging_face, tmp_path: Path) -> None:
    hugging_face.save_to_disk(tmp_path / "saved")
    check_hugging_face(open_images(f"hf:{tmp_path}/saved"))


def test_parquet_written_by_hugging_face_keeps_class_names(hugging_face, tmp_path: Path) -> None:
    hugging_face.to_parquet(tmp_path / "x.parquet")
    check_hugging_face(open_images(tmp_path / "x.parquet"))


def test_splits_of_a_saved_data_set_are_chosen_by_name(hugging_face, tmp_path: Path) -> None:
    import datasets

    splits = {"train": hugging_face, "test": hugging_face.select(range(2))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = open_images(f"hf:{tmp_path}/saved")
    check_hugging_face(source)
    assert source.notes == ("The split train is read; left out: test (2).",)
    assert open_images(source.spec).notes == ()
    test = open_images(f"hf:{tmp_path}/saved:test")
    assert len(test) == 2 and test.info(1).id == "test/000001"
    with pytest.raises(UserError, match=r"no split 'val'.*saved:train, hf:.*saved:test"):
        open_images(f"hf:{tmp_path}/saved:val")


def test_a_hub_style_folder_of_images_opens_through_its_paths(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = [tmp_path / f"{i}.png" for i in range(N)]
    for i, path in enumerate(paths):
        write_picture(path, seed=i)
    kind = datasets.Features({"image": datasets.Image()})
    rows = {"image": [str(path) for path in paths]}
    datasets.Dataset.from_dict(rows, features=kind).save_to_disk(tmp_path / "saved")
    source = open_images(f"hf:{tmp_path}/saved")
    assert same_pictures(source) and source.labels() == []


def test_a_folder_that_is_no_saved_data_set_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="cannot be opened as a folder written by save_to_disk"):
        open_images(f"hf:{tmp_path}")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"sparsight\[datasets\]"):
        open_images("hf:some/name")


def test_the_fingerprint_of_files_follows_their_size_and_time(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded(picture(), "PNG"))])
    before = open_images(tmp_path / "x.tar").fingerprint()
    (tmp_path / "moved").mkdir()
    shutil.copy2(tmp_path / "x.tar", tmp_path / "moved" / "x.tar")
    assert open_images(tmp_path / "moved" / "x.tar").fingerprint() == before
    write_tar(tmp_path / "x.tar", [("a.png", encoded(picture(1), "PNG")), ("b.txt", b"")])
    assert open_images(tmp_path / "x.tar").fingerprint() != before


def test_json_sidecars_bring_label_and_captions(tmp_path: Path) -> None:
    described = json.dumps({"class_name": "anchor", "captions": ["one", "two"]}).encode()
    write_tar(tmp_path / "x.tar", [("a.jpg", encoded(picture(), "JPEG")), ("a.json", described)])
    info = open_images(tmp_path / "x.tar").info(0)
    assert (info.label, info.captions) == ("anchor", ("one", "two"))


def test_sparse_members_of_a_shard_are_counted(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        write_picture(tmp_path / name)
    with (tmp_path / "1.jpg").open("ab") as file:
        file.truncate(2**21)
    packed = [tmp_path / "a.tar", "-C", tmp_path, "1.jpg", "2.jpg"]
    done = subprocess.run(["tar", "--sparse", "-cf", *packed], capture_output=True)
    if done.returncode:
        pytest.skip("this tar packs no sparse files")
    source = open_images(tmp_path / "a.tar")
    assert source.info(0).id == "a.tar/2" and len(source) == 1
    assert "1 members of the shards are sparse files" in " ".join(source.notes)


def test_pipes_and_links_to_nothing_among_parquet_files_are_failed_images(tmp_path: Path) -> None:
    cells = {"image": pa.array([encoded(picture(0), "PNG")]), "label": ["x"], "class": ["y"]}
    pq.write_table(pa.table(cells), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").symlink_to("nowhere")
    os.mkfifo(tmp_path / "c.parquet")
    source = open_images(f"parquet:{tmp_path}")
    assert len(source) == 3 and source.labels() == ["x"]
    assert source.fingerprint() == open_images(source.spec).fingerprint()
    assert "are read: label; not read: class." in " ".join(source.notes)
    with pytest.raises(ImageError, match="not a regular file"):
        source.load(2)


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pa.array([encoded(picture(0), "PNG")]), pa.array(["x"]), pa.array(["y"])]
    table = pa.Table.from_arrays(columns, names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns named 'label'"):
        open_images(tmp_path / "a.parquet")
