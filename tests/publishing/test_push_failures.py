"""What can go wrong on the way to the Hub: one message each, and an exit code that says whose
fault.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub_server import HubServer
from sparsight.cli import main
from sparsight.sae import SparseAutoencoder

ID = "ada/clip-sae"


@pytest.fixture
def fails(private_run: Path, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a push that must fail, and returns its single message."""

    def check(*arguments: str, run: Path = private_run, to: str = ID, code: int = 2) -> str:
        assert main(["push", str(run), "--to", to, *map(str, arguments)]) == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.count("sparsight: ") == 1 and message.count("\n") == 1, message
        return message

    return check


def test_without_a_token_nothing_is_tried(hub: HubServer, fails, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = fails()
    assert "no token" in message and "hf auth login" in message and "--dry-run" in message
    assert not hub.requests


def test_offline_nothing_is_tried(hub: HubServer, fails, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in fails()
    assert not hub.requests


def test_a_token_that_the_hub_does_not_know(hub: HubServer, fails, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "token-of-nobody")
    assert "does not know the token (401" in fails()


def test_an_organisation_of_somebody_else(hub: HubServer, fails) -> None:
    message = fails(to="bob/clip-sae")
    assert "bob/clip-sae: the token may not write there (403" in message
    assert "bob must be you" in message
    assert not hub.repositories


def test_a_repository_of_somebody_else(hub: HubServer, fails) -> None:
    hub.make("bob/clip-sae")
    assert "the token may not write there (403" in fails(to="bob/clip-sae")
    hub.make("bob/hidden", private=True)
    assert "the token may not write there (403" in fails(to="bob/hidden")


def test_a_repository_that_holds_something_else(hub: HubServer, fails) -> None:
    hub.make(ID, README__md=b"# A model", model__bin=b"0")
    message = fails()
    assert "something else (model.bin)" in message
    assert "README.md" in hub.repositories[ID].files()
    assert len(hub.repositories[ID].messages) == 1


def test_a_licence_that_the_hub_does_not_know(hub: HubServer, fails) -> None:
    message = fails("--license", "wtf")
    assert "would not take it" in message and "license" in message


@pytest.mark.parametrize(
    ("part", "status", "code", "said"),
    [
        ("/repos/create", 500, 1, "failed (500: made to fail). Try again later."),
        ("/repos/create", 429, 1, "failed (429"),
        ("/preupload/", 404, 2, "no such repository or branch (404"),
        ("/lfs/objects/batch", 403, 2, "may not write there (403"),
        ("/lfs/verify", 422, 2, "would not take it (422"),
        ("/commit/", 412, 2, "would not take it (412"),
    ],
)
def test_every_refusal_of_the_hub_is_reported(
    part: str, status: int, code: int, said: str, hub: HubServer, fails
) -> None:
    hub.failing = (part, status)
    assert said in fails(code=code)


def test_a_hub_that_cannot_be_reached(hub: HubServer, fails, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    message = fails(code=1)
    assert f"The Hub ({url}) could not be reached" in message and "--dry-run" in message


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("clip-sae", "name a user or organisation too, as in my-name/clip-sae"),
        ("ada/clip/sae", "is not the name of a repository"),
        ("ada/my sae", "is not the name of a repository"),
        ("../sae", "is not the name of a repository"),
    ],
)
def test_an_invalid_repository_name(to: str, said: str, hub: HubServer, fails) -> None:
    assert said in fails(to=to)
    assert not hub.requests


def test_a_folder_without_a_finished_run(hub: HubServer, fails, tmp_path: Path) -> None:
    assert "hold a trained SAE" in fails(run=tmp_path)
    assert "does not exist" in fails(run=tmp_path / "gone")
    assert not hub.requests


def test_an_autoencoder_of_another_project(
    hub: HubServer, fails, private_run: Path, tmp_path: Path
) -> None:
    sae = SparseAutoencoder.from_pretrained(private_run)
    sae.save_pretrained(tmp_path / "foreign", format="sparsify")
    assert "of another project" in fails(run=tmp_path / "foreign")
    assert not hub.requests


def test_a_missing_repository_name(private_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(private_run)]) == 2
    assert "--to ORG/NAME" in capsys.readouterr().err


def test_settings_out_of_range(hub: HubServer, fails) -> None:
    assert "latents is -1" in fails("--latents", "-1")
    assert "seed is -1" in fails("--seed", "-1")
