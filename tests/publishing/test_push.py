"""From a run to the Hub and back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from publishing_parts import EVIL, SITES

import sparsight as sp
from hub_server import HubServer
from sparsight.cli import main
from sparsight.errors import UserError
from sparsight.latents.run_files import read_run
from sparsight.publishing import push_to_hub
from sparsight.publishing.pictures import TILE, latent_pictures
from sparsight.sae import SparseAutoencoder
from sparsight.training import Run
from sparsight.vision import VisionModel

ID = "ada/clip-sae"


def pushed(hub: HubServer, repo_id: str = ID, branch: str = "main") -> dict[str, bytes]:
    """The files of a repository, except the one that the Hub itself adds."""
    files = hub.repositories[repo_id].files(branch)
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def written(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def snippet(card: str) -> str:
    """The first Python block of a card."""
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def measured(run: Run) -> Path:
    """The evaluated and indexed run."""
    return run.folder(SITES[1])


def test_a_pushed_sae_loads_again_bit_for_bit(
    hub: HubServer, measured: Path, model: VisionModel
) -> None:
    done = push_to_hub(measured, ID, latents=2, model=model, quiet=True)
    loaded = SparseAutoencoder.from_pretrained(ID)
    here = SparseAutoencoder.from_pretrained(measured)
    assert loaded.fingerprint() == here.fingerprint()
    assert loaded.config == here.config
    assert loaded.metadata["site"] == SITES[1]
    assert done.url == f"{hub.url}/{ID}/commit/{hub.repositories[ID].branches['main']}"
    assert done.files == {path: len(data) for path, data in pushed(hub).items()}


def test_the_card_has_header_figures_training_and_pictures(
    hub: HubServer, measured: Path, model: VisionModel
) -> None:
    push_to_hub(measured, ID, latents=3, model=model, license="mit", quiet=True)
    files = pushed(hub)
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "sparsight" and header["license"] == "mit"
    assert "sparse-autoencoder" in header["tags"]
    for line in (
        "| site | blocks.3.resid_post |",
        "| latents | 128 |",
        "| sparsity | TopK, k = 8, rectify = True |",
        "| FVU | 0.125 | 0.875 | 0.375 |",
        "|  | SAE | untrained SAE | PCA |",
        "which is 75.0 % of the model's own 80.0 %",
        "| SAE | 60.0 % | 47.5–70.0 % |",
        "Zero-shot on 64 images, 5 classes.",
        "in the last 3,200 vectors",
        "| 1,024 |",
        '```toml\nschema_version = 1\nstore = "acts"\n',
    ):
        assert line in card, line
    pictures = re.findall(r"!\[.*\]\((.*?)\)", card)
    assert len(pictures) == 3
    assert sorted(pictures) == sorted(path for path in files if path.startswith("pictures/"))


def test_foreign_names_are_escaped_in_the_card_and_named_latents_come_first(
    hub: HubServer, measured: Path, model: VisionModel
) -> None:
    push_to_hub(measured, ID, latents=2, model=model, quiet=True)
    card = pushed(hub)["README.md"].decode()
    assert EVIL not in card and "<script>" not in card
    assert card.index(r"**&lt;script&gt;alert(1)&lt;/script&gt; \| \`sun\`**") < card.index(
        "**latent "
    )


def test_the_card_says_how_its_latents_were_chosen(
    measured: Path, tmp_path: Path, model: VisionModel
) -> None:
    for n, how in (
        (1, "Latents: 1 latent is the easiest to understand, judged by"),
        (3, "Latents: 3 latents are the easiest to understand, judged by"),
    ):
        push_to_hub(measured, ID, latents=n, model=model, dry_run=tmp_path / str(n), quiet=True)
        assert how in (tmp_path / str(n) / "README.md").read_text()


def test_a_picture_has_the_top_images_above_their_heatmaps(
    hub: HubServer, measured: Path, tmp_path: Path, model: VisionModel
) -> None:
    push_to_hub(measured, ID, latents=1, model=model, dry_run=tmp_path / "dry", quiet=True)
    (path,) = (tmp_path / "dry" / "pictures").iterdir()
    with Image.open(path) as picture:
        assert picture.height == 2 * TILE + 4 and picture.width == 8 * TILE + 7 * 4
        assert not picture.info


def test_without_the_model_the_pictures_have_no_heatmaps(measured: Path) -> None:
    run = read_run(measured, "run")
    found = latent_pictures(run, "It is gone.", n=2, seed=0, quiet=True)
    assert found is not None and found.notes == ["No heatmaps: It is gone."]
    assert len(found.pictures) == 2 and not any(each.heatmaps for each in found.pictures)


def test_the_snippet_of_the_card_works_as_it_is(hub: HubServer, measured: Path) -> None:
    push_to_hub(measured, ID, latents=0, quiet=True)
    found: dict[str, torch.Tensor] = {}
    exec(snippet(pushed(hub)["README.md"].decode()), found)
    assert found["x"].shape == found["x_hat"].shape == (8 * 65, 192)
    error = (found["x"] - found["x_hat"]).square().sum() / found["x"].square().sum()
    assert 0 < error < 1


def test_the_snippet_decodes_jpegs_as_the_model_did(run: Run, tmp_path: Path) -> None:
    sae = run.sae(SITES[0])
    sae.metadata["model"] = {**sae.metadata["model"], "preprocessing": {"jpeg_min_side": 128}}
    sae.save_pretrained(tmp_path / "run")
    push_to_hub(tmp_path / "run", ID, latents=0, quiet=True, dry_run=tmp_path / "dry")
    code = snippet((tmp_path / "dry/README.md").read_text())
    found: dict[str, Any] = {}
    exec(code.replace(ID, str(tmp_path / "run")), found)
    assert found["model"].min_side == 128 and "images.load(i, model.min_side)" in code


def test_if_others_cannot_load_the_model_the_snippet_works_without_it(
    hub: HubServer, private_run: Path
) -> None:
    push_to_hub(private_run, ID, quiet=True)
    code = snippet(pushed(hub)["README.md"].decode())
    assert "load_model" not in code
    found: dict[str, torch.Tensor] = {}
    exec(code, found)
    assert found["x_hat"].shape == (8, 192)


def test_the_snippet_of_a_saved_sae_works_as_it_is(private_run: Path) -> None:
    sae = SparseAutoencoder.from_pretrained(private_run)
    code = snippet((sae.save_pretrained(private_run.parent / "again") / "README.md").read_text())
    found: dict[str, torch.Tensor] = {}
    exec(code.replace("this folder or Hub id", str(private_run)), found)
    assert found["x_hat"].shape == (8, 192)


def test_several_sites_get_a_folder_each_and_a_card_that_lists_them(
    hub: HubServer, run: Run, model: VisionModel
) -> None:
    push_to_hub(run, "lab/both", latents=1, model=model, quiet=True)
    files = pushed(hub, "lab/both")
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: sparsight\n")
    for site in SITES:
        assert f"({site}/README.md)" in card
        names = {path.removeprefix(f"{site}/") for path in files if path.startswith(site)}
        assert {"config.json", "sae.safetensors", "README.md"} <= names
        loaded = SparseAutoencoder.from_pretrained(f"lab/both/{site}")
        assert loaded.fingerprint() == run.sae(site).fingerprint()
    assert "sae.safetensors" not in files
    exec(snippet(card), {})


def test_no_local_paths_are_uploaded(
    hub: HubServer, run: Run, private_run: Path, model: VisionModel
) -> None:
    push_to_hub(run, "lab/both", latents=1, model=model, quiet=True)
    push_to_hub(private_run, ID, quiet=True)
    for files in (pushed(hub, "lab/both"), pushed(hub)):
        for path, data in files.items():
            for secret in ("/home", "home-of-ada", "secret project", "machine", "labels.csv"):
                assert secret.encode() not in data, f"{secret} in {path}"
    files = pushed(hub)
    card = files["README.md"].decode()
    assert "| images | photos\\[0:64\\] |" in card and "| model | clip |" in card
    assert 'store = "acts"' in card
    assert json.loads(files["config.json"])["metadata"]["model"]["id"] == "clip"
    assert "base_model" not in card and "datasets" not in card


def test_a_dry_run_writes_the_files_and_does_not_contact_the_hub(
    hub: HubServer, measured: Path, tmp_path: Path, model: VisionModel
) -> None:
    done = push_to_hub(measured, ID, latents=2, model=model, dry_run=tmp_path / "dry", quiet=True)
    assert done.url is None and not hub.requests
    push_to_hub(measured, ID, latents=2, model=model, quiet=True)
    assert written(tmp_path / "dry") == pushed(hub)
    here = SparseAutoencoder.from_pretrained(tmp_path / "dry")
    assert here.fingerprint() == SparseAutoencoder.from_pretrained(measured).fingerprint()
    with pytest.raises(UserError, match="is not empty"):
        push_to_hub(measured, ID, dry_run=tmp_path / "dry", quiet=True)


def test_missing_parts_are_listed_with_the_command_that_makes_them(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    done = push_to_hub(run.folder(SITES[0]), ID, dry_run=tmp_path / "dry", quiet=True)
    card = (tmp_path / "dry" / "README.md").read_text()
    assert "`sparsight evaluate`" in card and "`sparsight index`" in card
    assert any("sparsight index" in note for note in done.notes)
    assert not (tmp_path / "dry" / "metrics.json").exists()


def test_a_second_push_removes_only_files_of_the_first(
    hub: HubServer, measured: Path, private_run: Path, tmp_path: Path, model: VisionModel
) -> None:
    hub.make(ID, README__md=b"# mine\n", LICENSE=b"mine")
    push_to_hub(measured, ID, latents=2, model=model, quiet=True)
    push_to_hub(measured, ID, latents=2, model=model, quiet=True)  # nothing new: no commit
    assert len(hub.repositories[ID].messages) == 2
    bare = tmp_path / "bare"
    shutil.copytree(private_run, bare)
    (bare / "metrics.json").unlink()
    push_to_hub(bare, ID, message="A better one", quiet=True)
    assert sorted(pushed(hub)) == ["LICENSE", "README.md", "config.json", "sae.safetensors"]
    assert hub.repositories[ID].messages[-1] == "A better one"


def test_several_saes_replace_one(hub: HubServer, run: Run, model: VisionModel) -> None:
    push_to_hub(run.folder(SITES[1]), ID, latents=1, model=model, quiet=True)
    push_to_hub(run, ID, latents=0, quiet=True)
    assert not {"config.json", "sae.safetensors", "metrics.json"} & set(pushed(hub))


def test_a_push_to_a_new_branch_leaves_main_alone(
    hub: HubServer, measured: Path, model: VisionModel
) -> None:
    push_to_hub(measured, ID, latents=0, revision="try/2", quiet=True)
    assert pushed(hub) == {}
    card = pushed(hub, branch="try/2")["README.md"].decode()
    assert f'from_pretrained("{ID}", revision="try/2")' in card
    loaded = SparseAutoencoder.from_pretrained(ID, revision="try/2")
    assert loaded.fingerprint() == SparseAutoencoder.from_pretrained(measured).fingerprint()
    push_to_hub(measured, ID, latents=1, model=model, revision="try/2", quiet=True)
    assert len(pushed(hub, branch="try/2")) == 5


def test_private_is_private(hub: HubServer, measured: Path) -> None:
    push_to_hub(measured, ID, latents=0, private=True, quiet=True)
    assert hub.repositories[ID].private
    push_to_hub(measured, ID, latents=0, private=True, quiet=True)
    hub.make("ada/public")
    with pytest.raises(UserError, match="already exists, and is public"):
        push_to_hub(measured, "ada/public", latents=0, private=True, quiet=True)
    assert not pushed(hub, "ada/public")


def test_the_verb_prints_where_and_how_much(
    hub: HubServer, private_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["push", str(private_run), "--to", ID]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(rf"{hub.url}/{ID}/commit/\w+ · 4 files, 0\.2 MB\n", shown.out)
    assert "`sparsight index` builds it" in shown.err
    assert main(["push", str(private_run), "--to", ID, "--dry-run", str(tmp_path / "dry")]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out


def test_the_name_in_the_api_is_the_same_function() -> None:
    assert sp.push_to_hub is push_to_hub
