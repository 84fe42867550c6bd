from __future__ import annotations

import re

import pytest

from sparsight.cli import attack, main
from sparsight.cli.main import VERBS
from tools.cli_reference import all_verbs, page


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """The reference's text about each verb."""
    parts = re.split(r"^## `sparsight ([^`]+)`.*$", page(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_reference_has_a_section_for_each_verb(sections: dict[str, str]) -> None:
    verbs = {*VERBS, *(f"attack {verb}" for verb in attack.VERBS)} - {"attack"}
    assert list(sections) == list(all_verbs())
    assert set(sections) == verbs


@pytest.mark.parametrize("verb", [*all_verbs()])
def test_the_reference_has_every_option_that_the_help_shows(
    verb: str, sections: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb.split(), "--help-all"]) == 0
    shown = re.findall(r"^  (--\S+|[A-Z]+)(?= |$)", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown
    missing = [
        name
        for name in shown
        if not re.search(rf"^\| `{re.escape(name)}[ `]", sections[verb], re.M)
    ]
    assert not missing


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_the_reference_has_the_flags_of_each_kind(kind: str, sections: dict[str, str]) -> None:
    assert f"**`--sparsity {kind}`**" in sections["train"]


def test_no_row_of_the_reference_is_broken_by_a_help_text(sections: dict[str, str]) -> None:
    for text in sections.values():
        for row in re.findall(r"^\|.*$", text, flags=re.MULTILINE):
            assert len(re.findall(r"(?<!\\)\|", row)) == 4, row
