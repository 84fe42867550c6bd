"""The check of English: it finds what it should, nothing else, and nothing in this checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import english
from tools.english import EXCEPTIONS, PATTERNS, Pattern, phrases_in, phrases_in_tree


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.example)
def test_every_pattern_finds_its_example_and_says_what_to_write(pattern: Pattern) -> None:
    found = list(phrases_in(f"\n{pattern.example}\n", "src/sparsight/room/module.py"))
    assert [each.instead for each in found] == [pattern.instead]
    assert str(found[0]).startswith("src/sparsight/room/module.py:2: ")


@pytest.mark.parametrize(
    "sentence",
    [
        "Train one autoencoder per site, about 300 images a second.",
        "photos/: no such folder, so the run starts from scratch.",
        "Of 100 images, 3 could not be decoded; one in a hundred is fine.",
        "A step in a run takes a second; one with a text takes two.",
        "Not one of them fits. So many images that memory runs out.",
        "This tells the user that it is an open question whether a token a user wrote matters.",
    ],
)
def test_plain_sentences_pass(sentence: str) -> None:
    assert not list(phrases_in(sentence, "docs/guide/page.md"))


def test_a_phrase_is_found_across_the_end_of_a_line_of_a_comment_or_a_literal() -> None:
    text = 'x = (\n    "draw the rest by "\n    f"lot"\n)  # once a step drawn by\n    # lot\n'
    assert [found.line for found in phrases_in(text, "src/a.py")] == [2, 4]


def test_names_of_tests_are_read_as_sentences_and_past_releases_are_not_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "def test_images_are_drawn_by_lot() -> None: ..."
    )
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## Unreleased\n\n## 0.1.0\n\nMade anew.\n")
    assert [(found.file, found.text) for found in phrases_in_tree(tmp_path)] == [
        ("tests/test_it.py", "by lot")
    ]


def test_nobody_stumbles_over_this_checkout() -> None:
    assert list(map(str, phrases_in_tree())) == []


def test_every_exception_has_a_reason_and_files() -> None:
    for files, phrase, reason in EXCEPTIONS:
        assert phrase and reason
        assert any(english.ROOT.glob(files)), files
