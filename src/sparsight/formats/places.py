"""Where an SAE lies: a folder, a file, or a place on the Hub, from which it alone is fetched.

Other projects keep many SAEs in one repository, so a name may go on behind the repository's:
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
"""How the names of files end that can hold tensors."""

CONFIGS = (".json", ".yaml", ".yml")
"""How the names of files end that can hold a configuration."""

_BESIDE = re.compile(
    r"(^|/)(optim\w*|(lr_)?scheduler|rank_\d+_state|state|trainer(_state)?|training_args"
    r"|activations_store_state|activation_whitening|sparsity|(optimizer|lr_scheduler)_\d+"
    r"|\w*log_feature_sparsity|training|stats|shard-\d+|top_examples)\.[^/]*$"
)
_DEEPEST, _MOST = 2, 2_000
_SHOWN = 12


def is_weights(file: str) -> bool:
    """Whether a file may hold an SAE, by its name: not what training resumes from, nor counts."""
    return file.endswith(WEIGHTS) and not _BESIDE.search(file)


def find(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    filename: str | None = None,
) -> Path:
    """The folder or file that a name means, fetched from the Hub where it is not here.

    Args:
        name: a path, or a repository on the Hub, which may go on with a folder or file in it.
        revision: of the repository.
        subfolder: in the folder or repository.
        filename: in that.

    Raises:
        UserError: there is nothing of this name, or it holds several SAEs.
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
        # A copy of a repository: what it lacks is not looked for on the Hub.
        raise UserError(f"{local}: no such folder or file{_nearby(local)}")
    inner = "/".join(parts[2:])
    return _fetched("/".join(parts[:2]), inner, revision, str(name)) / inner


def choose(files: Sequence[str], inner: str, name: str) -> list[str]:
    """Which files of a repository one SAE needs.

    Args:
        files: of the repository.
        inner: the folder or file in it, "" for its root.
        name: for messages.

    Raises:
        UserError: there is no SAE, or more than one.
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
        f"{name}: holds {len(choices)} SAEs on the Hub. Name one behind the repository: "
        f"{some_of(choices)}."
    )


def files_in(folder: Path) -> tuple[str, ...]:
    """Names, relative to a folder, of the files in it and up to two folders below.

    Raises:
        SparsightError: a folder cannot be listed.
    """
    found: list[str] = []
    folders = [(folder, 0)]
    while folders and len(found) < _MOST:
        place, depth = folders.pop(0)
        try:
            inside = sorted(place.iterdir())
        except OSError as error:
            raise SparsightError(f"{place}: cannot be listed ({error}).") from error
        for each in inside:
            if each.is_file():
                found.append(each.relative_to(folder).as_posix())
            elif each.is_dir() and depth < _DEEPEST and not each.name.startswith("."):
                folders.append((each, depth + 1))
    return tuple(found[:_MOST])


def folders_of(files: Iterable[str]) -> list[str]:
    """The folders that some files lie in, in order; numbers in their names count as numbers."""
    folders = {str(PurePosixPath(each).parent) for each in files}
    return sorted(folders, key=lambda each: re.sub(r"\d+", lambda n: n[0].zfill(12), each))


def some_of(names: Sequence[str]) -> str:
    """The first of some names, for messages."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _nearby(missing: Path) -> str:
    """What the folder has that lies nearest above a missing place, to end a sentence with."""
    there = next(each for each in missing.absolute().parents if each.is_dir())
    if there in (Path.cwd(), Path.home(), *Path.cwd().parents):
        return "."  # it holds everything
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
    """The root of the repository, with what one SAE needs."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted: list[str] | None = None
    unreachable: Exception | None = None
    try:
        try:
            found = HfApi().model_info(repository, revision=revision, timeout=30)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:
            # There is no way to the Hub, which has many names; what was fetched before is here.
            unreachable = error
        else:
            wanted = choose([each.rfilename for each in found.siblings or ()], inner, name)
        root = Path(
            snapshot_download(
                repository,
                revision=revision,
                # Names, which may hold what stands for others in a pattern.
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
