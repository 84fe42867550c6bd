from __future__ import annotations

import re

from code_blocks import PAGES, ROOT

PICTURES = ROOT / "docs" / "pictures"
NAMED = re.compile(r"pictures/[\w-]+\.(?:webp|svg)")


def named_in_pages() -> set[str]:
    return {name for page in PAGES for name in NAMED.findall(page.read_text(encoding="utf-8"))}


def test_pages_use_exactly_the_existing_pictures() -> None:
    assert named_in_pages() == {f"pictures/{path.name}" for path in PICTURES.iterdir()}


def test_each_picture_and_all_together_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in PICTURES.iterdir()}
    assert {name: size for name, size in sizes.items() if size > 60_000} == {}
    assert sum(sizes.values()) < 600_000


def test_every_plot_has_a_light_and_a_dark_version() -> None:
    names = named_in_pages()
    assert {name.replace("-light.", "-dark.") for name in names if "-light." in name} == {
        name for name in names if "-dark." in name
    }
