"""The files around the code agree with each other and with the code."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import sparsight

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_workflows_check_every_python_that_the_package_claims():
    workflow = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())
    job = workflow["jobs"]["check"]
    pythons = job["strategy"]["matrix"]["python"]
    claimed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if ":: 3." in name]
    assert pythons == claimed
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert any(step.get("run") == ".ci/run" for step in job["steps"])


def test_the_citation_names_the_version_that_is_here():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sparsight.__version__
    assert citation["license"] == PROJECT["license"]


def test_commit_hooks_run_every_command_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    lint = makefile.partition("\nlint:")[2].partition("\n\n")[0].replace("$(BIN)", ".venv/bin")
    commands = [line.strip().partition(" $")[0] for line in lint.splitlines()[1:]]
    entries = [hook["entry"].removesuffix(" --fix") for hook in hooks]
    assert entries == [command.removesuffix(" --check") for command in commands]


def test_a_source_distribution_holds_every_file_of_the_repository():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no git repository")
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    always = {"README.md", "LICENSE", "pyproject.toml", ".gitignore"}
    included = {*hatch["build"]["targets"]["sdist"]["include"], *always}
    assert {name.partition("/")[0] for name in listed.stdout.splitlines()} <= included
