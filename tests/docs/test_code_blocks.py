from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from code_blocks import MADE_THERE, PAGES, blocks_of, name_of
from page_runner import run_page

WITH_CODE = [page for page in PAGES if any(b.reason is None for b in blocks_of(page))]

ON_THE_HUB = ("docs/guide/push.md",)
"""Pages that write to the Hub: they get a stand-in that speaks its protocol."""

MOST_NOT_RUN = 11
"""How many blocks may be marked as not run: the Hub, a GPU, a server, hours, or another package."""


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_code_block_of_a_page_runs(
    page: Path, workshop: Path, request: pytest.FixtureRequest
) -> None:
    if name_of(page) in ON_THE_HUB:
        request.getfixturevalue("hub")
    for name in MADE_THERE.get(name_of(page), ()):
        shutil.rmtree(workshop / name)
    run_page(page, {"__name__": "__main__"})


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    marked = [f"{name_of(p)}:{b.line}" for p in PAGES for b in blocks_of(p) if b.reason is not None]
    assert len(marked) <= MOST_NOT_RUN, marked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_mark_is_just_above_a_block(page: Path) -> None:
    marks = page.read_text().count("<!-- not run")
    assert marks == sum(block.reason is not None for block in blocks_of(page))
