from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from sparsight.errors import UserError
from sparsight.naming.vocabulary import CATEGORIES, Vocabulary, open_vocabulary
from sparsight.naming.vocabulary_files import Entry


def test_the_visual_vocabulary_has_10_000_words_of_known_kinds() -> None:
    words = open_vocabulary("visual")
    assert len(words) == 10_000
    assert len({word.casefold() for word in words.words}) == 10_000
    assert all(word == word.strip() and word.isprintable() and word for word in words.words)
    assert set(words.categories) == set(CATEGORIES)
    assert words.category_of("red") == "colour"
    assert {"wheel", "sunflower"} <= set(words.words)


def test_the_visual_vocabulary_names_its_sources_and_its_licence() -> None:
    folder = resources.files("sparsight.naming") / "data"
    head = (folder / "visual.tsv").read_text(encoding="utf-8")[:1000]
    assert "WordNet 3.0" in head and head.count("SHA-256") >= 4
    licence = (folder / "LICENSE").read_text(encoding="utf-8")
    assert "MIT" in licence and "WordNet" in licence and "Princeton University" in licence


def test_the_calibration_vocabulary_has_everything_that_scenes_show() -> None:
    words = open_vocabulary("calibration")
    kinds = set(words.categories)
    assert {"object", "colour", "texture", "text"} <= kinds
    assert {"anchor", "red object", "blue background"} <= set(words.words)


@pytest.mark.parametrize(
    ("name", "text", "words", "kinds"),
    [
        ("a.txt", "\ufeffred car\r\nsun\r\n\r\n", ["red car", "sun"], [None, None]),
        (
            "a.csv",
            'word,category\n"car, red",object\nsun,\n',
            ["car, red", "sun"],
            ["object", None],
        ),
        ("a.tsv", "category\tword\ncolour\tred\n", ["red"], ["colour"]),
    ],
)
def test_a_users_file_is_read(
    name: str, text: str, words: list[str], kinds: list[str | None], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text.encode())
    read = open_vocabulary(str(tmp_path / name))
    assert list(read.words) == words
    assert list(read.categories) == kinds


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("blank.txt", b"a\n\nb\n", "line 2"),
        ("blank.csv", b"word,category\ncat,animal\n,x\n", "line 3"),
        ("twice.txt", b"red car\nsun\nRed Car\n", "line 3"),
        ("control.txt", b"a\nb\tc\n", "line 2"),
        ("latin.txt", b"a\ncaf\xe9\n", "UTF-8"),
        ("a.txt", b"", "empty"),
        ("a.csv", b"name\na\n", "column 'word'|column word"),
        ("cells.csv", b"word,category\na,b\nc\n", "line 3"),
        ("words.json", b"[]", "is none of these"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_vocabulary(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.txt"):
        open_vocabulary(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="visual"):
        open_vocabulary("visuals")


def test_words_of_some_kinds_keep_their_order() -> None:
    words = Vocabulary(
        "mine", (Entry("red", "colour"), Entry("cat", "animal"), Entry("blue", "colour"))
    )
    assert words.select(["colour"]).words == ("red", "blue")
    with pytest.raises(UserError, match="plant"):
        words.select(["plant"])
    assert words.fingerprint != words.select(["colour"]).fingerprint
