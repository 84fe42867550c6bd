"""What `make release` does to a repository, and when it refuses; the build is tried by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("tools/release.py", "src/sparsight/__init__.py", "CITATION.cff", "pyproject.toml")
CHANGELOG = """# Changes

## Unreleased

### New

- Latents have names.

## 0.1.0

The first release.
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
"""In a hook of git, these would name the repository of the hook."""

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="there is no git here")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the files that a release touches, all committed."""
    for name in COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "config", "user.name", "Somebody")
    git(tmp_path, "config", "user.email", "somebody@example.org")
    commit(tmp_path)
    return tmp_path


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=ENVIRONMENT
    ).stdout


def commit(repository: Path) -> None:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "A change")


def release(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools/release.py"), *arguments]
    command += ["--date", "2031-02-03"]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def state(repository: Path) -> tuple[str, str, str]:
    return (
        git(repository, "rev-parse", "HEAD"),
        git(repository, "tag"),
        git(repository, "status", "--porcelain"),
    )


def test_a_release_is_one_commit_with_an_annotated_tag(repository: Path) -> None:
    done = release(repository, "999.0.0", "--skip-build")
    assert done.returncode == 0, done.stderr
    assert git(repository, "log", "--format=%s").splitlines() == ["Release 999.0.0", "A change"]
    assert git(repository, "cat-file", "-t", "v999.0.0") == "tag\n"
    assert git(repository, "rev-parse", "v999.0.0^{}") == git(repository, "rev-parse", "HEAD")
    assert git(repository, "status", "--porcelain") == ""
    assert '\n__version__ = "999.0.0"\n' in (repository / "src/sparsight/__init__.py").read_text()
    citation = (repository / "CITATION.cff").read_text()
    assert citation.count("\nversion: 999.0.0\ndate-released: 2031-02-03\n") == 1
    dated = "## Unreleased\n\n## 999.0.0 (2031-02-03)\n\n### New"
    changelog = (repository / "CHANGELOG.md").read_text()
    assert changelog == CHANGELOG.replace("## Unreleased\n\n### New", dated)


def test_after_a_release_the_next_one_waits_for_a_change(repository: Path) -> None:
    assert release(repository, "999.0.0rc1", "--skip-build").returncode == 0
    done = release(repository, "999.0.0", "--skip-build")
    assert done.returncode == 2
    assert "is empty: nothing to release" in done.stderr
    changelog = repository / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("Unreleased\n", "Unreleased\n\n- A fix.\n"))
    commit(repository)
    assert release(repository, "999.0.0", "--skip-build").returncode == 0
    assert (repository / "CITATION.cff").read_text().count("date-released") == 1


def test_a_dry_run_shows_the_changes_and_keeps_none(repository: Path) -> None:
    before = state(repository)
    done = release(repository, "999.0.0", "--skip-build", "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in ('+__version__ = "999.0.0"', "+version: 999.0.0", "+## 999.0.0 (2031-02-03)"):
        assert line in done.stdout.splitlines()
    assert state(repository) == before


def test_a_build_that_fails_leaves_the_repository_as_it_was(repository: Path) -> None:
    """Here it fails for want of hatch_build.py, if not for want of `build`."""
    before = state(repository)
    done = release(repository, "999.0.0")
    assert done.returncode == 2
    assert "`python -m build` failed; nothing has changed" in done.stderr
    assert state(repository) == before


def _leave_a_file(repository: Path) -> None:
    (repository / "notes.txt").touch()


def _empty_the_changelog(repository: Path) -> None:
    (repository / "CHANGELOG.md").write_text(CHANGELOG.replace("- Latents have names.\n", ""))
    commit(repository)


def _release_it_before(repository: Path) -> None:
    git(repository, "tag", "v999.0.0")


def _leave_the_branch(repository: Path) -> None:
    git(repository, "checkout", "--quiet", "--detach")


@pytest.mark.parametrize(
    ("version", "prepare", "told"),
    [
        ("999.0.0", _leave_a_file, "the working tree is not clean: notes.txt. Commit or remove"),
        ("999.0.0", _empty_the_changelog, "the section `## Unreleased` of CHANGELOG.md is empty"),
        ("999.0.0", _release_it_before, "the tag v999.0.0 exists already"),
        ("999.0.0", _leave_the_branch, "HEAD is on no branch"),
        ("0.1.0rc1", None, "0.1.0rc1 is not higher than"),
        ("v1.2", None, "'v1.2' is no version; expected X.Y.Z"),
        ("", None, "which version?"),
    ],
)
def test_a_release_that_cannot_be_cut_says_why_and_changes_nothing(
    repository, version, prepare, told
):
    if prepare is not None:
        prepare(repository)
    before = state(repository)
    done = release(repository, version, "--skip-build")
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert state(repository) == before
