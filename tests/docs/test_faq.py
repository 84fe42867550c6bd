from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from code_blocks import ROOT, blocks_of

from sparsight.cli import main

ERRORS = [
    block.text.split("\n", 1)
    for block in blocks_of(ROOT / "docs" / "faq.md")
    if block.text.startswith("$ sparsight")
]


def test_the_page_has_the_ten_errors_that_people_meet() -> None:
    assert len(ERRORS) >= 10


@pytest.mark.parametrize(("command", "told"), ERRORS, ids=lambda text: text[:60])
def test_a_command_ends_with_the_message_on_the_page(
    command: str, told: str, workshop: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "open_clip:" in command and importlib.util.find_spec("open_clip"):
        pytest.skip("open_clip is installed here")
    assert main(shlex.split(command)[2:]) == 2
    message = capsys.readouterr().err
    for folder in (workshop, shared / "start"):
        message = message.replace(str(folder), "/home/you")
    assert _unhashed(message[message.index("sparsight: ") :]) == _unhashed(told)


def _unhashed(message: str) -> str:
    """A message without the hashes of weights, which depend on how torch draws numbers."""
    return re.sub(r"\(weights [0-9a-f]{8}\)", "(weights …)", message.strip())
