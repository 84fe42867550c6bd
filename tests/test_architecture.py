"""The rules of the house that no single room can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import grimp
import pytest

import sparsight
from sparsight.sae.sparsity import AnySparsity

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def test_imports_run_downwards_only():
    # In a process of its own: import-linter's configuration of logging silences other tests.
    linter = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    done = subprocess.run(
        [*linter, "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def import_graph() -> grimp.ImportGraph:
    graph = grimp.build_graph("sparsight", cache_dir=None)
    # The root points to public names, and loads them when they are used.
    for imported in graph.find_modules_directly_imported_by("sparsight"):
        graph.remove_import(importer="sparsight", imported=imported)
    # `from_pretrained` and `save_pretrained` know other projects' formats, which know the SAE.
    graph.remove_import(importer="sparsight.sae.autoencoder", imported="sparsight.formats")
    return graph


def test_no_circle_of_imports_joins_more_than_three_files(import_graph: grimp.ImportGraph) -> None:
    circles = {
        frozenset(
            import_graph.find_upstream_modules(module)
            & import_graph.find_downstream_modules(module)
            | {module}
        )
        for module in import_graph.modules
    }
    assert len(import_graph.modules) > 200
    assert not [sorted(circle) for circle in circles if len(circle) > 3]


def test_no_room_holds_more_than_15_percent_of_the_lines() -> None:
    package = ROOT / "src" / "sparsight"
    lines = {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    rooms: Counter[str] = Counter()
    for path, count in lines.items():
        rooms[path.relative_to(package).parts[0]] += count
    largest, count = rooms.most_common(1)[0]
    assert count < 0.15 * sum(lines.values()), largest


def test_nobody_but_other_projects_formats_asks_what_kind_a_sparsity_is() -> None:
    kinds = {kind.__name__ for kind in get_args(AnySparsity)} | {"Sparsity"}
    package = ROOT / "src" / "sparsight"
    asked = []
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] == "formats":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                choices = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.MatchClass):
                choices = {ast.unparse(node.cls)}
            else:
                continue
            asked += [(path.name, node.lineno)] if kinds & choices else []
    assert not asked


def test_importing_the_package_loads_no_heavy_library():
    loaded = run_python("import sparsight, sys; print(*sys.modules)").split()
    assert "sparsight" in loaded
    assert not {"torch", "transformers", "pyarrow", "matplotlib", "rich"} & set(loaded)


@pytest.mark.parametrize("name", sparsight.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(sparsight, name).__doc__
    assert name in dir(sparsight)


def test_public_names_and_their_homes_agree():
    assert sorted(sparsight.__all__) == sorted(sparsight._HOME_OF)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sparsight.nonsense  # noqa: B018


def test_files_name_no_index_and_no_machine():
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text, name
