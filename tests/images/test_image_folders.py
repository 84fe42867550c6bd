from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_files import write_picture

from sparsight.errors import UserError
from sparsight.images import ImageError, ImageSource, open_images


def ids(source: ImageSource) -> list[str]:
    return [source.info(index).id for index in range(len(source))]


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    folder = tmp_path / "animals"
    for number, name in enumerate(["dog/b.jpg", "cat/a.png", "cat/deep/c.webp", "dog/A.JPG"]):
        write_picture(folder / name, seed=number)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(["1.jpg", "2.jpg", "3.jpg"]):
        write_picture(folder / "images" / name, seed=number)
    return folder


def test_the_first_sub_folder_is_the_label_and_ids_are_sorted_paths(animals: Path) -> None:
    source = open_images(animals)
    assert ids(source) == ["cat/a.png", "cat/deep/c.webp", "dog/A.JPG", "dog/b.jpg"]
    assert [source.info(i).label for i in range(4)] == ["cat", "cat", "dog", "dog"]
    assert source.labels() == ["cat", "dog"]
    assert source.info(0).uri == str(animals / "cat/a.png")


def test_a_wrapping_folder_is_no_label(photos: Path) -> None:
    assert open_images(photos).labels() == []


def test_the_spec_opens_the_same_source_from_any_working_folder(
    animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(animals.parent)
    relative = open_images("animals")
    monkeypatch.chdir(tmp_path)
    again = open_images(relative.spec)
    assert ids(again) == ids(relative)
    assert again.fingerprint() == relative.fingerprint()


@pytest.mark.parametrize(
    "name, text",
    [
        ("captions.txt", 'image,caption\n1.jpg,one a\n1.jpg,"one, b"\n3.jpg,three\n'),
        (
            "metadata.csv",
            'file_name,text\nimages/1.jpg,one a\n./images/1.jpg,"one, b"\nimages/3.jpg,three\n',
        ),
        ("captions.tsv", "filename\tcaption\n1.jpg\tone a\n1.jpg\tone, b\n3.jpg\tthree\n"),
        (
            "metadata.jsonl",
            '{"file_name": "1.jpg", "caption": ["one a", "one, b"]}\n\n'
            '{"file_name": "3.jpg", "caption": "three"}\n',
        ),
    ],
)
def test_tables_in_the_folder_give_captions(photos: Path, name: str, text: str) -> None:
    (photos / name).write_text(text)
    source = open_images(photos)
    assert source.info(0).captions == ("one a", "one, b")
    assert source.info(0).caption == "one a"
    assert source.info(1).captions == () and source.info(1).caption is None
    assert source.info(2).caption == "three"
    assert source.notes == (f"{name}: says nothing about 1 images.",)


def test_a_given_table_brings_labels_and_is_part_of_the_spec(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "mine.parquet"
    rows = {"file": ["1.jpg", "2.jpg", "3.jpg"], "label": ["x", "y", None], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(rows), table)
    source = open_images(photos, table=table)
    again = open_images(source.spec)
    for opened in (source, again):
        assert [opened.info(i).label for i in range(3)] == ["x", "y", None]
        assert opened.info(2).caption == "c"
        assert opened.labels() == ["x", "y"]


def test_a_label_table_and_a_caption_table_add_up(animals: Path) -> None:
    (animals / "labels.csv").write_text("file,label\ncat/a.png,tom\n")
    (animals / "captions.csv").write_text("file,caption\na.png,a cat\n")
    info = open_images(animals).info(0)
    assert (info.label, info.caption) == ("tom", "a cat")


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,caption\nnone.jpg,x\n", "names no image of the folder.*'none.jpg'"),
        ("file,colour\n1.jpg,red\n", "has the columns file, colour; expected a file column"),
        ("file,caption\n1.jpg\n", "row 2 has 1 cells"),
        ("file,caption\n1.jpg,A dog, running\n", "row 2 has 3 cells.*',' must stand in double"),
        ("", "has the columns .none."),
    ],
)
def test_a_table_that_does_not_fit_is_refused(photos: Path, text: str, message: str) -> None:
    (photos / "captions.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        open_images(photos)


def test_rows_and_files_that_fit_nothing_are_noted(photos: Path) -> None:
    (photos / "captions.txt").write_text("file,caption\n1.jpg,x\ngone.jpg,y\n")
    (photos / "notes.md").write_text("")
    assert open_images(photos).notes == (
        "1 files are not images by their names (.md ×1).",
        "captions.txt: 1 of 2 files named there are not in the folder ('gone.jpg', …).",
        "captions.txt: says nothing about 2 images.",
    )


def test_names_in_any_script_or_encoding_are_ids(tmp_path: Path) -> None:
    write_picture(tmp_path / "größe/日本 🐈.png")
    latin = os.fsdecode(b"\xff.png")  # a name that is not UTF-8
    (tmp_path / "größe" / latin).write_bytes((tmp_path / "größe/日本 🐈.png").read_bytes())
    source = open_images(tmp_path)
    assert sorted(ids(source)) == ["größe/\\xff.png", "größe/日本 🐈.png"]
    assert [source.load(i).size for i in range(2)] == [(32, 24)] * 2
    for index in range(2):
        source.info(index).uri.encode()


def test_a_table_written_on_another_system_still_matches(tmp_path: Path) -> None:
    write_picture(tmp_path / "caf\u00e9" / "x.png")  # composed
    (tmp_path / "metadata.csv").write_text("file,caption\ncafe\u0301\\x.png,decomposed\n")
    assert open_images(tmp_path).info(0).caption == "decomposed"


def test_a_link_to_a_folder_above_ends(animals: Path) -> None:
    (animals / "cat" / "loop").symlink_to(animals, target_is_directory=True)
    assert len(open_images(animals)) == 4


def test_hidden_files_are_left_out(animals: Path) -> None:
    write_picture(animals / ".thumbs/x.png")
    (animals / "cat/._a.png").write_bytes(b"macOS")
    source = open_images(animals)
    assert len(source) == 4
    assert source.notes[0].startswith("2 hidden files or folders are left out (")


BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "jsonl", "parquet"])
def test_captions_keep_every_line_break_that_they_hold(photos: Path, ending: str) -> None:
    captions = [f"a{mark}dog" for mark in [*BREAKS, "\r", "\n", "\r\n"]]
    names = ["1.jpg"] * len(captions)
    path = photos / f"captions.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"file": names, "caption": captions}), path)
    elif ending == "jsonl":
        rows = [{"file": "1.jpg", "caption": caption} for caption in captions]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
        path.write_text(text, newline="")
    else:
        mark = "\t" if ending == "tsv" else ","
        text = f"file{mark}caption\n" + "".join(f'1.jpg{mark}"{caption}"\n' for caption in captions)
        path.write_text(text, newline="")
    assert open_images(photos).info(0).captions == tuple(captions)


def test_what_stands_for_no_label_in_a_table_is_noted(photos: Path) -> None:
    text = "file,label\n1.jpg,None\n2.jpg,-1\n3.jpg,cat\n3.jpg,dog\n"
    (photos / "labels.csv").write_text(text)
    source = open_images(photos)
    assert [source.info(i).label for i in range(3)] == [None, None, "cat"]
    assert source.notes == (
        "labels.csv: 2 labels such as 'None' are read as no label.",
        "labels.csv: 1 rows give another label than an earlier row for the same file ('3.jpg', …); "
        "the first label is taken.",
    )


def test_names_that_differ_only_by_blanks_or_unicode_form_are_distinguished(tmp_path: Path) -> None:
    names = ["a.png", " a.png", "caf\u00e9.png", "cafe\u0301.png"]
    for name in names:
        write_picture(tmp_path / name)
    rows = [{"file_name": name, "text": ascii(name)} for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_images(tmp_path)
    found = {source.info(i).id: source.info(i).caption for i in range(4)}
    assert found == {name: ascii(name) for name in names}


def test_tables_in_sub_folders_are_read_and_the_nearest_counts(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("0.png", "deep/0.png"):
            write_picture(tmp_path / split / name)
        row = {"file_name": "0.png", "text": f"a {split} caption"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/0.png,far\ntest/deep/0.png,far\n")
    (tmp_path / "test" / "labels.csv").write_text("colour\nred\n")
    source = open_images(tmp_path)
    assert [source.info(i).caption for i in range(4)] == [
        "a test caption", "far", "a train caption", None
    ]  # fmt: skip
    told = "\n".join(source.notes)
    assert "test/labels.csv: not read" in told and "has the columns colour" in told
    assert "train/metadata.jsonl: says nothing about 1 images." in source.notes
    assert "The labels look like splits of a data set (test, train), not like classes" in told
    (tmp_path / "mine.csv").write_text("file,text\ntest/0.png,mine\n")
    given = open_images(tmp_path, table=tmp_path / "mine.csv")
    assert [given.info(i).caption for i in range(4)] == ["mine", None, None, None]
    assert "not read, because another table was named." in "\n".join(given.notes)


def test_text_files_beside_images_are_their_captions(tmp_path: Path) -> None:
    for i in range(4):
        write_picture(tmp_path / "00000" / f"{i}.jpg", seed=i)
        write_picture(tmp_path / "00001" / f"{i}.jpg", seed=i)
    (tmp_path / "00000" / "0.txt").write_text("from text")
    (tmp_path / "00000" / "0.json").write_text('{"caption": "not this"}')
    (tmp_path / "00000" / "1.json").write_text('{"caption": "from json", "url": "x"}')
    (tmp_path / "00000" / "2.txt").write_text("0 0.5 0.5 0.25 0.25\n7 0.1 0.1 0.5 0.5\n")
    (tmp_path / "00000" / "stray.txt").write_text("of no image")
    source = open_images(tmp_path)
    assert [source.info(i).caption for i in range(4)] == ["from text", "from json", None, None]
    assert source.notes == (
        "1 files are not images by their names (.txt ×1).",
        "The labels look like numbers of shards (00000, 00001), not like classes: sub-folders name "
        "them.",
        "3 images have a .txt or .json of their own name beside them; their captions are read from "
        "it.",
    )
    before = source.fingerprint()
    (tmp_path / "00000" / "0.txt").write_text("another caption")
    assert open_images(tmp_path).fingerprint() != before


def test_the_fingerprint_notices_added_changed_and_removed_files(animals: Path) -> None:
    seen = {open_images(animals).fingerprint()}
    assert open_images(animals).fingerprint() in seen
    write_picture(animals / "cat/new.png")
    seen.add(open_images(animals).fingerprint())
    write_picture(animals / "cat/new.png", seed=5)
    seen.add(open_images(animals).fingerprint())
    source = open_images(animals)
    (animals / "cat/new.png").unlink()
    seen.add(source.fingerprint())
    assert len(seen) == 4


def test_the_fingerprint_notices_what_tables_say(animals: Path, tmp_path: Path) -> None:
    seen = {open_images(animals).fingerprint()}
    table = animals / "labels.csv"
    for label in ("tom", "tim"):
        table.write_text(f"file,label\ncat/a.png,{label}\n")
        seen.add(open_images(animals).fingerprint())
    captions = animals / "captions.csv"
    for caption in ("a cat", "a dog"):
        captions.write_text(f"file,caption\ncat/a.png,{caption}\n")
        seen.add(open_images(animals).fingerprint())
    assert len(seen) == 5
    moved = tmp_path / "captions-elsewhere.csv"
    captions.rename(moved)
    table.unlink()
    given = open_images(animals, table=moved).fingerprint()
    assert given not in seen
    moved.touch()
    assert open_images(animals, table=moved).fingerprint() == given


def test_a_selection_keeps_ids_and_its_spec_opens_it_again(animals: Path) -> None:
    source = open_images(animals)
    view = source.select([3, 0, 2]).select([2, 0])
    assert ids(view) == ["dog/A.JPG", "dog/b.jpg"]
    assert view.labels() == ["dog"]
    again = open_images(pickle.loads(pickle.dumps(view)).spec)
    assert ids(again) == ids(view)
    assert again.fingerprint() == view.fingerprint() != source.fingerprint()
    assert ids(source.subset(1, 99)) == ids(source)[1:]
    assert view.load(0).tobytes() == source.load(2).tobytes()


def test_a_selection_beyond_the_end_is_refused(animals: Path) -> None:
    with pytest.raises(UserError, match="no image 4; it has 4"):
        open_images(animals).select([0, 4])
    with pytest.raises(UserError, match="no image 9"):
        open_images(f"{animals}[9]")
    with pytest.raises(IndexError):
        open_images(animals).info(-1)


def test_links_in_a_circle_and_pipes_are_images_that_fail(photos: Path) -> None:
    (photos / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(photos / "pipe.jpg")
    os.mkfifo(photos / "images" / "1.txt")
    source = open_images(photos)
    assert ids(source.select([1, 2, 3, 4])) == [
        "images/2.jpg", "images/3.jpg", "loop.jpg", "pipe.jpg"
    ]  # fmt: skip
    with pytest.raises(ImageError, match=r"its \.txt is not a regular file"):
        source.info(0)
    for index, reason in ((3, "symbolic links"), (4, "not a regular file")):
        with pytest.raises(ImageError, match=reason):
            source.load(index)


def test_a_table_with_two_columns_of_one_name_is_refused(photos: Path) -> None:
    table = photos / "images" / "t.csv"
    table.write_text("file_name,label,label\n1.jpg,cat,dog\n")
    with pytest.raises(UserError, match="several columns named 'label'"):
        open_images(photos, table=table)
    names = ["file_name", "label", "label"]
    columns = [pa.array(["1.jpg"]), pa.array(["cat"]), pa.array(["dog"])]
    pq.write_table(pa.Table.from_arrays(columns, names=names), photos / "t.parquet")
    with pytest.raises(UserError, match="several columns named 'label'"):
        open_images(photos, table=photos / "t.parquet")


def test_columns_that_are_not_read_beside_those_that_are_stand_in_the_notes(photos: Path) -> None:
    table = photos / "t.csv"
    table.write_text("\n\nfile_name,class,label,caption,text\n1.jpg,cat,3,a,b\n")
    source = open_images(photos, table=table)
    assert source.labels() == ["3"]
    assert any("are read: label, caption; not read: class, text." in n for n in source.notes)


def test_json_lines_may_end_in_cr_and_labels_are_valid_text(photos: Path) -> None:
    table = photos / "t.jsonl"
    one, two = '{"file": "1.jpg", "label": "a"}', '{"file": "2.jpg", "label": "\\udc80"}'
    table.write_bytes(f"\ufeff{one}\r{two}\r".encode())
    source = open_images(photos, table=table)
    assert source.labels() == ["\\x80", "a"]
    assert source.info(1).label == "\\x80"
