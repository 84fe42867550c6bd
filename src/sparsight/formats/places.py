"""Where an SAE lies: a folder, a file, or a place on the Hub, from which only it is fetched.

Other projects keep many SAEs in one repository, so a name may continue after the repository's:
`org/repo/sub/folder`, `org/repo/file.pt`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from sparsight.errors import SparsightError, UserError

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pkl.gz")
"""Endings of files that can hold tensors."""

CONFIGS = (".json", ".yaml", ".yml")
"""Endings of files that can hold a configuration."""

_BESIDE = re.compile(
    r"(^|/)(optim\w*|(lr_)?scheduler|rank_\d+_state|state|trainer(_state)?|training_args"
    r"|activations_store_state|activation_whitening|sparsity|(optimizer|lr_scheduler)_\d+"
    r"|\w*log_feature_sparsity|training|stats|shard-\d+|top_examples)\.[^/]*$"
)
_DEEPEST, _MOST = 2, 2_000
_SHOWN = 12


def is_weights(file: str) -> bool:
    """Return whether a file may hold an SAE, by its name: not states to resume from, nor counts."""
    return file.endswith(WEIGHTS) and not _BESIDE.search(file)


def find(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    filename: str | None = None,
) -> Path:
    """Return the folder or file that a name means; fetch it from the Hub if it is not local.

    Args:
        name: a path, or a repository on the Hub, optionally followed by a folder or file in it.
        revision: revision of the repository.
        subfolder: folder within the folder or repository.
        filename: file within that.

    Raises:
        UserError: nothing has this name, or it holds several SAEs.
    """
    inside = [each for each in (subfolder, filename) if each]
    local = Path(name).expanduser().joinpath(*inside)
    if local.exists():
        return local
    parts = [*str(name).split("/"), *"/".join(inside).split("/")]
    if str(name).startswith((".", "/", "~")) or Path(name).exists() or ".." in parts:
        raise UserError(f"{local}: no such folder or file{_nearby(local)}")
    parts = [each for each in parts if each]
    if len(parts) > 2 and Path(*parts[:2]).is_dir():
        # A copy of a repository: what it lacks is not fetched from the Hub.
        raise UserError(f"{local}: no such folder or file{_nearby(local)}")
    inner = "/".join(parts[2:])
    return _fetched("/".join(parts[:2]), inner, revision, str(name)) / inner


def choose(files: Sequence[str], inner: str, name: str) -> list[str]:
    """Choose the files of a repository that one SAE needs.

    Args:
        files: the files of the repository.
        inner: the folder or file in it; "" for its root.
        name: the user's name for it, for messages.

    Raises:
        UserError: there is no SAE, or there are several.
    """
    if inner in files:
        above = [PurePosixPath(inner).parent, PurePosixPath(inner).parent.parent]
        return [inner, *(each for each in _configs(files) if PurePosixPath(each).parent in above)]
    folder = f"{inner}/" if inner else ""
    below = [each for each in files if each.startswith(folder)]
    weights = [each for each in below if is_weights(each)]
    here = [each for each in weights if "/" not in each[len(folder) :]]
    safe = [each for each in here if each.endswith(".safetensors")]
    if len(here) > 1 and len(safe) == 1:
        here = safe
    if not here and len(weights) == 1:
        here = weights
    if len(here) == 1:
        return [*here, *(each for each in _configs(below) if each.count("/") <= here[0].count("/"))]
    if not weights:
        others = folders_of(each for each in files if is_weights(each))
        has = f"; the repository has {some_of(others)}" if inner and others else ""
        raise UserError(f"{name}: holds no file with tensors on the Hub{has}.")
    choices = here or folders_of(weights)
    raise UserError(
        f"{name}: holds {len(choices)} SAEs on the Hub. Name one after the repository: "
        f"{some_of(choices)}."
    )


def files_in(folder: Path) -> tuple[str, ...]:
    """Return names, relative to a folder, of the files in it and up to two folders below.

    Raises:
        SparsightError: a folder cannot be listed.
    """
    files: list[str] = []
    folders = [(folder, 0)]
    while folders and len(files) < _MOST:
        place, depth = folders.pop(0)
        try:
            inside = sorted(place.iterdir())
        except OSError as error:
            raise SparsightError(f"{place}: cannot be listed ({error}).") from error
        for each in inside:
            if each.is_file():
                files.append(each.relative_to(folder).as_posix())
            elif each.is_dir() and depth < _DEEPEST and not each.name.startswith("."):
                folders.append((each, depth + 1))
    return tuple(files[:_MOST])


def folders_of(files: Iterable[str]) -> list[str]:
    """Return the folders of some files, sorted; numbers in their names sort as numbers."""
    folders = {str(PurePosixPath(each).parent) for each in files}
    return sorted(folders, key=lambda each: re.sub(r"\d+", lambda n: n[0].zfill(12), each))


def some_of(names: Sequence[str]) -> str:
    """Return the first of some names, for messages."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _nearby(missing: Path) -> str:
    """End a sentence with what the nearest existing folder above a missing place has."""
    there = next(each for each in missing.absolute().parents if each.is_dir())
    if there in (Path.cwd(), Path.home(), *Path.cwd().parents):
        return "."  # the root, or the working folder
    shown = there if missing.is_absolute() else Path(os.path.relpath(there))
    try:
        weights = [each for each in files_in(there) if is_weights(each)]
    except SparsightError:
        return "."
    names = [each for each in folders_of(weights) if each != "."]
    names += [each for each in weights if "/" not in each]
    return f"; {shown} has {some_of(names)}." if names else f"; {shown} holds no SAE."


def _configs(files: Sequence[str]) -> list[str]:
    return [each for each in files if each.endswith(CONFIGS)]


def _fetched(repository: str, inner: str, revision: str | None, name: str) -> Path:
    """Fetch what one SAE needs, and return the root of the repository."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted: list[str] | None = None
    unreachable: Exception | None = None
    try:
        try:
            on_hub = HfApi().model_info(repository, revision=revision, timeout=30)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:
            # The Hub cannot be reached, for one of many reasons; use what was fetched before.
            unreachable = error
        else:
            wanted = choose([file.rfilename for file in on_hub.siblings or ()], inner, name)
        root = Path(
            snapshot_download(
                repository,
                revision=revision,
                # File names, in which characters that are special in patterns must be escaped.
                allow_patterns=wanted and [glob.escape(each) for each in wanted],
                local_files_only=wanted is None,
            )
        )
    except UserError:
        raise
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        told = str(unreachable or error).strip().partition("\n")[0]
        beside = _nearby(Path(name)) if Path(repository.partition("/")[0]).is_dir() else "."
        raise UserError(
            f"{name}: no such folder, and the Hub gave no SAE of that name ({told}){beside}"
        ) from error
    if wanted is None:
        here = [each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()]
        choose(sorted(here), inner, name)
    return root
