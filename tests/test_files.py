from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsight.errors import SparsightError, UserError
from sparsight.files import lock, read_json, write_json, write_text
from sparsight.text import path_of, without_surrogates

fcntl = pytest.importorskip("fcntl", reason="there are no such locks on Windows")

HOLDER = (
    "import sys\nfrom sparsight.files import lock\n"
    "with lock(sys.argv[1], 'held'):\n    print('held', flush=True)\n    sys.stdin.read()"
)


def holder(path: Path) -> subprocess.Popen[bytes]:
    """Another process that holds a lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_folder_that_cannot_be_made_is_a_fault_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SparsightError, match=r"file/a\.txt: could not be written \(") as caught:
        write_text(tmp_path / "file" / "a.txt", "a")
    assert not isinstance(caught.value, UserError)
    with (
        pytest.raises(SparsightError, match=r"file/a: cannot be made or written \("),
        lock(tmp_path / "file" / "a" / ".lock", "held"),
    ):
        pass


def test_files_are_as_open_as_the_umask_allows(tmp_path: Path) -> None:
    script = (
        "import os, sys\nos.umask(0o027)\nfrom sparsight.files import write_text\n"
        "write_text(sys.argv[1], 'a')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, tmp_path / "a.txt"]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_lock_keeps_another_process_out_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".lock"
    with holder(path) as other:
        with pytest.raises(UserError, match="somebody is here"), lock(path, "somebody is here"):
            pass
        assert path.exists()
        other.stdin.close()
        other.wait()
    with lock(path, "somebody is here"):
        assert path.exists()
    assert not list(path.parent.iterdir())


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert path.exists()
    with lock(path, "somebody is here"):
        pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else two would hold it: one by the old file, one by the new."""
    path = tmp_path / ".lock"
    lockf, calls = fcntl.lockf, []

    def after_the_holder_left(handle: int, flags: int) -> None:
        if not calls:
            path.unlink()
        calls.append(handle)
        lockf(handle, flags)

    monkeypatch.setattr(fcntl, "lockf", after_the_holder_left)
    with lock(path, "somebody is here"):
        assert os.path.samestat(os.fstat(calls[-1]), path.stat())
    assert len(calls) == 2


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    with (
        pytest.warns(UserWarning, match="this file system has no locks"),
        lock(tmp_path / ".lock", "somebody is here"),
    ):
        pass


def test_text_that_is_not_utf8_is_written_escaped_and_named_files_are_found_again(
    tmp_path: Path,
) -> None:
    odd = os.fsdecode(b"caf\xe9") + "\ud83d"
    assert without_surrogates(odd) == "caf\\xe9\\ud83d"
    write_json(tmp_path / "x.json", {"name": odd, "fine": "\u2028\U0001f600"})
    assert read_json(tmp_path / "x.json") == {"name": odd, "fine": "\u2028\U0001f600"}
    write_text(tmp_path / "x.txt", odd)
    assert (tmp_path / "x.txt").read_text() == without_surrogates(odd)
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert path_of(without_surrogates(str(folder))) == folder
    literal = tmp_path / "caf\\xe9"
    literal.mkdir()
    assert path_of(str(literal)) == literal


def test_nothing_is_written_under_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"caf\\xe9: the name is not UTF-8"):
        write_text(tmp_path / os.fsdecode(b"caf\xe9"), "x")
