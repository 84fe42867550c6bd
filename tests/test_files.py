from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cutting import cut
from sparsight.errors import SparsightError, UserError
from sparsight.files import atomic_path, read_json, write_json, write_text
from sparsight.folders import new_file, new_folder, replaced, settled
from sparsight.leftovers import remove_leftovers
from sparsight.locks import lock
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.tensor_files import write_safetensors
from sparsight.text import path_of, without_surrogates

fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

HOLDER = (
    "import sys\nfrom sparsight.locks import lock\n"
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


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(
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


def contents(folder: Path) -> dict[str, str]:
    return {
        each.relative_to(folder).as_posix(): each.read_text()
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    }


OLD, NEW = {"a": "old", "b": "old", "c": "old"}, {"a": "new", "b": "new"}


def replace(path: Path, files: dict[str, str] = NEW) -> None:
    with replaced(path, OLD) as staged:
        for name, text in files.items():
            (staged / name).write_text(text)


@pytest.mark.parametrize("way", ["exchanged", "renamed twice", "file by file"])
def test_killed_at_any_point_the_files_of_a_folder_are_all_old_or_all_new(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "renamed twice":
        monkeypatch.setattr("sparsight.folders._exchanged", lambda *_: False)
    other = {"notes": "mine"} if way == "file by file" else {}
    outcomes = []
    for place in itertools.count():
        path = tmp_path / str(place) / "x"
        path.mkdir(parents=True)
        for name, text in (OLD | other).items():
            (path / name).write_text(text)
        if not cut(lambda path=path: replace(path), place, tmp_path):
            break
        if way == "exchanged":  # anyone may look, without our help
            assert contents(path) in (OLD, NEW)
        found = contents(settled(path))
        found = {name: text for name, text in found.items() if not name.startswith(".new")}
        assert found in (OLD | other, NEW | other)
        outcomes.append(found["a"])
        replace(path)
        assert contents(path.parent) == {f"x/{name}": text for name, text in (NEW | other).items()}
    assert outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"old", "new"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_at_any_point_something_new_is_whole_or_not_there_and_is_made_again(
    tmp_path: Path, kind: str
) -> None:
    def make(path: Path) -> None:
        if kind == "file":
            with new_file(path) as staged:
                staged.write_text("new")
        else:
            with new_folder(path) as staged:
                (staged / "a").write_text("new")
                (staged / "b").mkdir()
                (staged / "b/c").write_text("new")

    whole = {"x": "new"} if kind == "file" else {"x/a": "new", "x/b/c": "new"}
    outcomes = []
    for place in itertools.count():
        folder = tmp_path / str(place)
        folder.mkdir()
        if not cut(lambda folder=folder: make(folder / "x"), place, tmp_path):
            break
        found = {name: text for name, text in contents(folder).items() if name[0] != "."}
        assert found in ({}, whole)
        outcomes.append(bool(found))
        make(folder / "x")
        assert contents(folder) == whole
        with pytest.raises(UserError, match="is there already"):
            make(folder / "x")
        assert contents(folder) == whole
    assert set(outcomes) == {False, True}


def test_what_somebody_else_made_is_not_taken_for_the_work_of_a_killed_process(
    tmp_path: Path,
) -> None:
    def make() -> None:
        with new_folder(tmp_path / "x") as staged:
            (staged / "a").write_text("new")

    place = next(
        n for n in itertools.count() if cut(make, n, tmp_path) and (tmp_path / "x").exists()
    )
    assert place and (tmp_path / ".x.lock").exists()
    (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mine").write_text("mine")
    with pytest.raises(UserError, match="is there already, and is not empty"):
        make()
    assert contents(tmp_path / "x") == {"mine": "mine"}


def test_temporary_files_of_killed_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    def die() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            os._exit(9)

    assert cut(die, 10**6, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "b.txt") as mine:
        assert [each.name for each in tmp_path.iterdir()] == [mine.name]
        write_text(tmp_path / "a.txt", "whole")
        mine.write_text("b")
    stranger = tmp_path / ".a.txt.01234567-1-abcdefgh.tmp"
    stranger.write_text("of another machine")
    write_text(tmp_path / "a.txt", "again")
    assert stranger.exists()
    os.utime(stranger, (0, 0))
    write_text(tmp_path / "a.txt", "again")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_a_temporary_file_of_another_users_killed_process_goes(tmp_path: Path) -> None:
    """Its parent has not asked for its end yet, and it may not be sent signals."""
    tmp_path.chmod(0o777)
    killed = os.fork()
    if killed == 0:
        os._exit(0)
    while Path(f"/proc/{killed}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    with atomic_path(tmp_path / "a.txt") as temporary:
        own = temporary.name
    (tmp_path / own.replace(f"-{os.getpid()}-", f"-{killed}-")).touch()
    try:
        other = os.fork()
        if other == 0:
            os.chdir(tmp_path)  # folders above are closed to others
            os.setuid(65534)
            remove_leftovers(Path())
            os._exit(0)
        assert os.waitpid(other, 0)[1] == 0
        assert {each.name for each in tmp_path.iterdir()} == {"a.txt"}
    finally:
        os.waitpid(killed, 0)


def test_two_that_replace_the_same_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    replace(tmp_path / "x", OLD)
    with holder(tmp_path / ".x.lock") as other:
        with (
            pytest.raises(UserError, match="x: another process is writing it") as told,
            replaced(tmp_path / "x", OLD, wait=0),
        ):
            pass
        assert "\n" not in str(told.value)
        assert contents(tmp_path / "x") == OLD
        other.stdin.close()
        other.wait()
    replace(tmp_path / "x")
    assert contents(tmp_path) == {"x/a": "new", "x/b": "new"}


def test_what_a_new_folder_holds_is_as_open_as_the_umask_allows(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("not ours")
    elsewhere.chmod(0o600)
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "x") as staged:
            (staged / "private").mkdir(mode=0o700)
            (staged / "private/a").touch(mode=0o600)
            (staged / "link").symlink_to(elsewhere)
            os.link(elsewhere, staged / "same")
    finally:
        os.umask(before)
    modes = {each.name: each.lstat().st_mode & 0o777 for each in (tmp_path / "x").rglob("*")}
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o750
    assert modes["private"] == 0o750 and modes["a"] == 0o640
    assert elsewhere.stat().st_mode & 0o777 == 0o600


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


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_weights_and_folders_are_as_open_as_the_umask_of_the_moment_allows(
    mask: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        SparseAutoencoder(4, SAEConfig(8, sparsity=TopK(2))).save_pretrained(tmp_path / "sae")
        write_safetensors({"a": torch.zeros(2)}, tmp_path / "sae" / "training.safetensors")
        with new_folder(tmp_path / "folder") as folder:
            save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert len(made) == 7
    for each in made:
        usual = 0o777 if each.is_dir() else 0o666
        assert each.stat().st_mode & 0o777 == usual & ~mask, each
