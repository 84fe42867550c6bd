from __future__ import annotations

import math
from pathlib import Path

import pytest

from sparsight.figures import FIGURES, NOT_MEASURED, dig, figure_of, glossary, shown_in
from tools.figures_table import PAGE, with_table

SOURCE = Path(__file__).parents[1] / "src" / "sparsight"


def test_the_documented_figures_are_those_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run: python -m tools.figures_table"


def test_every_figure_has_one_key_a_gloss_that_is_a_sentence_and_a_range() -> None:
    keys = [figure.key for figure in FIGURES]
    assert len(set(keys)) == len(keys)
    for figure in FIGURES:
        assert figure.gloss.endswith(".") and figure.gloss[0].isupper(), figure.key
        assert figure.range[0] < figure.range[1], figure.key
        assert bool(figure.variants) <= ("*" in figure.key), figure.key
        assert not figure.term or figure.term in glossary(), figure.key


def test_a_figure_shows_shares_in_per_cent_and_variants_by_name() -> None:
    dead, fvu = figure_of("dead"), figure_of("fvu")
    assert (dead.show(0.01234), dead.precise(0.01234), dead.axis) == (
        "1.2 %", "1.23 %", "dead latents (%)",
    )  # fmt: skip
    assert (fvu.show(0.123456), fvu.precise(0.123456), fvu.axis) == ("0.123", "0.1235", "FVU")
    assert fvu.precise(None) == NOT_MEASURED
    assert math.isinf(fvu.range[1]) and dead.range == (0, 1)
    top1 = figure_of("zero_shot.*.top1").at("original")
    assert top1.label == "zero-shot top-1, original"
    assert top1.of({"zero_shot": {"original": {"top1": 0.5}}}) == 0.5
    assert top1.of({"zero_shot": None}) is None


def test_a_sweep_has_the_headlines_first() -> None:
    headlines = [figure for figure in shown_in("sweep") if figure in shown_in("headline")]
    assert list(shown_in("sweep")[: len(headlines)]) == headlines
    assert [figure.key for figure in shown_in("log")] == ["fvu", "l0", "dead"]


@pytest.mark.parametrize("path", ["a.c", "a.b.c", "x"])
def test_what_is_not_there_is_none(path: str) -> None:
    assert dig({"a": {"b": 1}}, path) is None
    assert dig({"a": {"b": 1}}, "a.b") == 1


def test_nothing_else_digs_in_metrics() -> None:
    found = [path for path in SOURCE.rglob("*.py") if "def dig(" in path.read_text()]
    found += [path for path in SOURCE.rglob("*.py") if "def _dig(" in path.read_text()]
    assert found == [SOURCE / "figures.py"]
