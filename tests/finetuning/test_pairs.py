"""Pair files and captions: what is read, and which errors name what cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import sparsight as sp
from finetuning_samples import NoisePictures, tiny_clip
from sparsight.errors import UserError
from sparsight.finetuning import captioned, open_pairs
from sparsight.finetuning.pairs import check_lengths, read_pairs


@pytest.fixture
def photos(tmp_path):
    """Three images, one of them in a sub-folder."""
    for name in ("one.png", "two.png", "deep/three.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path)
    return tmp_path / "photos"


NAMED = {"one.png": ("a cat", "the cat"), "two.png": ("a dog",), "deep/three.png": ("sun",)}


def as_json(pairs):
    return json.dumps({file: list(texts) for file, texts in pairs.items()})


def as_lines(pairs):
    return "\n".join(json.dumps({"file_name": f, "captions": list(t)}) for f, t in pairs.items())


def as_csv(pairs):
    return "file,caption\n" + "".join(f"{f},{t}\n" for f, texts in pairs.items() for t in texts)


@pytest.mark.parametrize(
    ("name", "write"), [("p.json", as_json), ("p.jsonl", as_lines), ("p.csv", as_csv)]
)
def test_every_kind_of_pair_file_is_read_alike(photos, name, write):
    (photos / name).write_text(write(NAMED))
    source = open_pairs(photos / name)
    assert {i.id: i.captions for i in map(source.info, range(len(source)))} == NAMED
    assert source.load(2).size == (8, 8)
    assert captioned(source).captions[0] == (("a cat", "the cat"),)


def test_a_pair_file_may_be_in_another_folder_than_its_images(photos, tmp_path):
    (tmp_path / "pairs.json").write_text(as_json(NAMED))
    assert len(open_pairs(tmp_path / "pairs.json", photos)) == 3
    with pytest.raises(UserError, match=r"3 of its 3 images.*are relative"):
        open_pairs(tmp_path / "pairs.json")


def test_missing_images_are_counted_noted_and_refused_above_a_share(photos):
    (photos / "p.json").write_text(as_json({**NAMED, "gone.png": ("a ghost",)}))
    with pytest.raises(UserError, match=r"1 of its 4 images.*gone\.png.*max_failed"):
        open_pairs(photos / "p.json")
    source = open_pairs(photos / "p.json", max_failed=0.3)
    assert len(source) == 3
    assert "1 of 4 images are missing" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "{", "p.json: is not JSON"),
        ("p.json", '[{"file": "one.png"}]', r"expected one JSON object .*\.jsonl"),
        ("p.json", '{"one.png": 3}', "'one.png': caption 1 is 3; expected text"),
        ("p.json", '{"one.png": ["a", null]}', "'one.png': caption 2 is null"),
        ("p.json", '{"one.png": {"a": "b"}}', "'one.png': caption 1 is"),
        ("p.json", '{"one.png": []}', "'one.png': has no captions"),
        ("p.json", '{"one.png": "  "}', "'one.png': has no captions"),
        ("p.json", "{}", "lists no images"),
        ("p.jsonl", '{"file": "one.png", "caption": "a"}\nnot json', "line 2: is not JSON"),
        ("p.jsonl", '{"file": "one.png"}', "line 1: has no caption field"),
        ("p.jsonl", '\n{"caption": "a"}', "line 2: has no file field"),
        ("p.jsonl", '{"file": 7, "caption": "a"}', "line 1: the file is 7"),
        ("p.jsonl", "[1]", "line 1: is a list; expected an object"),
        ("p.csv", "file,caption\none.png", "row 2 has 1 cells"),
        ("p.csv", "file,price\none.png,3\n", "caption"),
    ],
)
def test_an_error_in_a_pair_file_names_line_or_entry_and_field(photos, name, text, message):
    (photos / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(photos / name)


def test_a_missing_pair_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="pair file does not exist"):
        open_pairs(tmp_path / "pairs.json")
    with pytest.raises(UserError, match="needs a pair file"):
        open_pairs("calibration:10", tmp_path)


def test_a_repeated_entry_keeps_all_its_captions(photos):
    (photos / "p.json").write_text('{"one.png": ["a"], "one.png": ["b"]}')
    assert read_pairs(photos / "p.json") == {"one.png": ("a", "b")}


def test_labels_are_put_into_sentences_and_captions_are_used_as_they_are():
    source = sp.open_images("calibration:20:3")
    label, caption = source.info(0).label, source.info(0).caption
    assert captioned(source, "captions").captions[0] == ((caption,),)
    prompts = captioned(source, "labels", ["a {}.", "{}"]).captions[0]
    assert prompts == ((f"a {label}.", label),)
    assert captioned(source, templates=["{}"]).captions[0] == ((caption,), (label,))


def test_images_without_a_caption_are_left_out_and_counted():
    source = NoisePictures(4, [("a cat",), ()])
    found = captioned(source)
    assert (found.places, found.without) == ((0, 2), 2)
    with pytest.raises(UserError, match="none of its 4 images has a label"):
        captioned(source, "labels")


def test_captions_over_length_are_refused_with_their_count_and_the_first(tmp_path):
    model = tiny_clip(tmp_path)
    texts = ["a cat", " ".join(["cat"] * 15), " ".join(["dog"] * 20)]
    assert model.count_tokens(texts) == [4, 17, 22]
    assert model.context_length == 16
    with pytest.raises(UserError, match=r"2 of 3 captions.* the 16.*has 17: 'cat cat"):
        check_lengths(model, texts)
    assert check_lengths(model, texts, truncate=True) == 2
    assert check_lengths(model, texts[:1]) == 0
