"""The recipes of docs/extending.md name files that exist, and names that stand in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text()
RECIPES = {
    section.partition("\n")[0]: section
    for section in PAGE.split("\n## ")[1:]
    if re.search(r"^1\. ", section, re.MULTILINE)
}
PLACEHOLDER = "NAME"


def steps(recipe: str) -> list[list[str]]:
    """What stands in backticks in each step of a recipe."""
    items = re.split(r"^\d+\. ", recipe, flags=re.MULTILINE)[1:]
    return [re.findall(r"`([^`]+)`", item) for item in items]


def is_path(name: str) -> bool:
    return "/" in name or Path(name).suffix in (".toml", ".yml", ".md")


def test_there_are_five_recipes():
    assert list(RECIPES) == [
        "A sparsity", "A checkpoint format", "An image source", "A metric", "A verb",
    ]  # fmt: skip


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_names_files_that_exist(title):
    for number, quoted in enumerate(steps(RECIPES[title]), 1):
        paths = [ROOT / name for name in quoted if is_path(name)]
        assert paths, f"step {number} names no file"
        for path in paths:
            exists = path.parent.is_dir() if PLACEHOLDER in path.name else path.is_file()
            assert exists, f"step {number}: {path.relative_to(ROOT)}"


@pytest.mark.parametrize("title", RECIPES)
def test_the_names_in_a_step_stand_in_its_files(title):
    """`encode` in a step about `sparsity/base.py` must be a word of that file."""
    for number, quoted in enumerate(steps(RECIPES[title]), 1):
        text = "\n".join(
            file.read_text() for name in quoted if is_path(name) for file in files(name)
        )
        for name in quoted:
            if not is_path(name) and PLACEHOLDER not in name:
                assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), f"step {number}: {name}"


def files(name: str) -> list[Path]:
    """The file; where it is yet to be written, those beside it, which it will be like."""
    path = ROOT / name
    return sorted(path.parent.glob(f"*{path.suffix}")) if PLACEHOLDER in path.name else [path]


def test_the_examples_of_the_recipes_exist():
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    for title, recipe in RECIPES.items():
        examples = re.findall(r"`(\w+)`", recipe.partition("\n\n1. ")[0])
        assert examples, title
        for example in examples:
            assert any(re.search(rf"\b{example}\b", source) for source in sources), example


def test_the_example_package_is_the_one_that_the_page_shows():
    shown = re.search(r"```toml[^\n]*\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    project = (ROOT / "tests/outside_package/pyproject.toml").read_text()
    for line in shown[1].splitlines():
        assert line.partition("#")[0].strip() in project, line
