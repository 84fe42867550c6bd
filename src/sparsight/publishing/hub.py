"""The upload to the Hugging Face Hub, with a clear message for whatever can go wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import sparsight
from sparsight.errors import SparsightError, UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

Files = Mapping[str, bytes | Path]
"""The files to upload, by path in the repository: contents, or a file on this machine."""

MAIN = "main"
_REPO_ID = re.compile(r"\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)
_OURS = re.compile(
    r"config\.json|sae\.safetensors|metrics\.json|README\.md|pictures/latent-\d+\.png"
)
_NEUTRAL = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
_INSTEAD = "--dry-run FOLDER writes the files without uploading them."


def check_repo_id(repo_id: str) -> None:
    """Check that a repository can have this name.

    Raises:
        UserError: it is not of the form ORG/NAME.
    """
    if "/" not in repo_id:
        raise UserError(f"{repo_id}: name a user or organisation too, as in my-name/{repo_id}.")
    if not _REPO_ID.fullmatch(repo_id):
        raise UserError(
            f"{repo_id}: is not the name of a repository. Give ORG/NAME of letters, digits, -, _ "
            "and ."
        )


def check_ready(token: str | None = None) -> None:
    """Check, before any work, that an upload is possible.

    Raises:
        UserError: the Hub is in offline mode, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "The Hub is in offline mode, so nothing can be uploaded. Unset HF_HUB_OFFLINE (and "
            f"TRANSFORMERS_OFFLINE); or {_INSTEAD}"
        )
    if not (token or get_token()):
        raise UserError(f"There is no token for the Hub. {_LOG_IN} {_INSTEAD}")


def upload(
    repo_id: str,
    files: Files,
    folders: Collection[str],
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    quiet: bool = False,
) -> str:
    """Put files into a repository in one commit, which also removes what an earlier push left.

    Args:
        repo_id: the repository; it is created if it does not exist.
        files: the files, by path in the repository.
        folders: folders of the SAEs in the repository; "" for its root.
        message: message of the commit.
        private: whether a repository that is created is private.
        revision: branch; it is created if it does not exist.
        token: by default the machine's.
        quiet: show no progress bars.

    Returns:
        The address of the commit.

    Raises:
        UserError: the Hub does not let this user write there, the repository holds something
            else, or it is public although `private` was asked for.
        SparsightError: the Hub cannot be reached, or fails.
    """
    from huggingface_hub import HfApi

    hub = HfApi(
        token=token, library_name="sparsight", library_version=sparsight.__version__
    )  # HF_ENDPOINT chooses the endpoint
    with _in_words(repo_id, hub.endpoint), _bars(quiet):
        hub.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not hub.model_info(repo_id).private:
            raise UserError(
                f"{repo_id}: already exists, and is public. Make it private in its settings on the "
                "Hub, choose another name, or leave --private out."
            )
        if revision not in (None, MAIN):
            hub.create_branch(repo_id, branch=str(revision), exist_ok=True)
        there = hub.list_repo_files(repo_id, revision=revision)
        _check_room(repo_id, there)
        done = hub.create_commit(
            repo_id,
            _operations(files, folders, there),
            commit_message=message,
            revision=revision,
        )
    return str(done.commit_url)


def _operations(
    files: Files, folders: Collection[str], there: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    gone = [
        path
        for path in there
        if path not in files
        and any(
            path.startswith(start) and _OURS.fullmatch(path[len(start) :])
            for start in {"", *(f"{folder}/" for folder in folders if folder)}
        )
    ]
    return [
        *(CommitOperationAdd(path, content) for path, content in files.items()),
        *(CommitOperationDelete(path) for path in gone),
    ]


def _check_room(repo_id: str, there: Sequence[str]) -> None:
    others = [path for path in there if path not in _NEUTRAL]
    if others and not any(PurePosixPath(path).name == "sae.safetensors" for path in others):
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise UserError(
            f"{repo_id}: holds no autoencoders but something else ({shown}), which a push would "
            "overwrite or mix with. Choose another name."
        )


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils
    change = quiet and not bars.are_progress_bars_disabled()
    if change:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if change:
            bars.enable_progress_bars()


@contextmanager
def _in_words(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises inside into one message."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base class of all errors of the HTTP library: requests, httpx or httpx2, by version.
    of_library: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except SparsightError:
        raise
    except (of_library, OSError, ValueError, RuntimeError) as error:
        if getattr(error, "filename", None):  # it concerns a file on this machine
            raise
        raise _error_for(error, repo_id, endpoint) from error


def _error_for(error: BaseException, repo_id: str, endpoint: str) -> SparsightError:
    answered = _answered(error)
    if answered is None:
        if isinstance(error, ValueError):
            return UserError(f"{repo_id}: the Hub would not take it: {_line(error)}")
        return SparsightError(
            f"The Hub ({endpoint}) could not be reached ({_line(error)}). Check the network and "
            f"try again; or {_INSTEAD}"
        )
    status = answered.response.status_code
    said = getattr(answered, "server_message", None) or _line(answered)
    owner = repo_id.partition("/")[0]
    if status == 401:
        return UserError(f"The Hub does not know the token (401: {said}). {_LOG_IN}")
    if status == 403:
        return UserError(
            f"{repo_id}: the token may not write there (403: {said}). {owner} must be you or an "
            "organisation of yours, and the token must have write access."
        )
    if status == 404:
        return UserError(f"{repo_id}: the Hub finds no such repository or branch (404: {said}).")
    if 400 <= status < 500 and status not in (408, 429):
        return UserError(f"{repo_id}: the Hub would not take it ({status}: {said}).")
    return SparsightError(f"The Hub ({endpoint}) failed ({status}: {said}). Try again later.")


def _answered(error: BaseException | None) -> Any:
    """Return the error behind this one that carries the Hub's answer; uploads wrap it."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error
        error = error.__cause__
    return None


def _line(error: BaseException) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split()) or type(error).__name__
