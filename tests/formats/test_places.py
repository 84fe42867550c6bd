from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from sparsight.errors import UserError
from sparsight.formats.places import choose, find
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK

SPARSIFY = [
    "README.md",
    "config.json",
    *(f"layers.{layer}/{file}" for layer in (3, 9) for file in ("cfg.json", "sae.safetensors")),
]
RUN = ["config.json", "ae.pt", "checkpoints/ae_100.pt", "optimizer_0.pt", "rank_0_state.pt"]


@pytest.mark.parametrize(
    ("files", "inner", "wanted"),
    [
        (SPARSIFY, "layers.9", ["layers.9/sae.safetensors", "layers.9/cfg.json"]),
        (RUN, "", ["ae.pt", "config.json"]),
        (RUN, "checkpoints/ae_100.pt", ["checkpoints/ae_100.pt", "config.json"]),
        (["checkpoint/sae.pt", "checkpoint/config.json"], "", None),
        (["sae.safetensors", "old.pt", "config.json"], "", ["sae.safetensors", "config.json"]),
        (["n_images_5.pt", "n_images_5_log_feature_sparsity.pt"], "", ["n_images_5.pt"]),
    ],
)
def test_no_more_is_fetched_than_one_sae_needs(
    files: list[str], inner: str, wanted: list[str] | None
) -> None:
    assert choose(files, inner, "org/repo") == (wanted or files)


@pytest.mark.parametrize(
    ("files", "inner", "message"),
    [
        (SPARSIFY, "", "holds 2 SAEs.*layers.3, layers.9"),
        (["a.pt", "b.pt"], "", "holds 2 SAEs.*a.pt, b.pt"),
        (["README.md"], "", "no file with tensors"),
        (SPARSIFY, "layers.4", r"no file with tensors .* has layers\.3, layers\.9\."),
    ],
)
def test_a_place_without_one_sae_is_named(files: list[str], inner: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(files, inner, "org/repo")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache with one repository in it, and no way to the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--org--repo"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("c0ffee")
    for layer in (3, 9):
        config = SAEConfig(8, sparsity=TopK(layer - 1))
        sae = SparseAutoencoder(4, config)
        sae.save_pretrained(root / "snapshots" / "c0ffee" / f"layers.{layer}", format="sparsify")
    return root / "snapshots" / "c0ffee"


def test_what_was_fetched_before_is_read_without_the_hub(hub: Path) -> None:
    for sae in (
        SparseAutoencoder.from_pretrained("org/repo/layers.3"),
        SparseAutoencoder.from_pretrained("org/repo", subfolder="layers.3"),
        SparseAutoencoder.from_pretrained("org/repo/layers.3/sae.safetensors", revision="main"),
    ):
        assert sae.config.sparsity == TopK(2)
    with pytest.raises(UserError, match="holds 2 SAEs"):
        SparseAutoencoder.from_pretrained("org/repo")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/other", "the Hub gave no SAE"),
        ("org/re po", "the Hub gave no SAE"),
        ("./runs/x", "no such folder or file"),
        ("org/repo/../../x", "no such folder or file"),
    ],
)
def test_a_name_that_means_nothing_is_refused(hub: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseAutoencoder.from_pretrained(name)


def test_a_folder_of_this_name_comes_before_the_hub(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    assert find("org/repo") == Path("org/repo")
    with pytest.raises(UserError, match="no such folder or file"):
        find("org/repo", subfolder="layers.3")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy of a repository of several SAEs, in the folder in which the test runs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    sae = SparseAutoencoder(4, SAEConfig(8, sparsity=TopK(2)))
    for hook in ("layers.0", "layers.10.mlp", "layers.2"):
        sae.save_pretrained(tmp_path / "mine" / "repo" / hook, format="sparsify")
    return tmp_path / "mine" / "repo"


def test_a_local_folder_of_several_lists_them_and_each_loads(copied: Path) -> None:
    listed = r"holds 3 SAEs\. Name one after the folder: layers\.0, layers\.2, layers\.10\.mlp\.$"
    for name in ("mine/repo", copied):
        with pytest.raises(UserError, match=listed):
            SparseAutoencoder.from_pretrained(name)
        assert SparseAutoencoder.from_pretrained(name, subfolder="layers.2").n_latents == 8
    (copied / "config.json").write_text("{}")
    with pytest.raises(UserError, match=listed):
        SparseAutoencoder.from_pretrained(copied)


@pytest.mark.parametrize(
    "name", ["mine/repo/layers.7", "mine/repo/layers.7/sae.pt", "./mine/repo/7"]
)
def test_a_name_that_a_local_folder_lacks_lists_what_it_has(copied: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"mine/repo has layers\.0, layers\.2, layers\.10\.mlp\.$"):
        SparseAutoencoder.from_pretrained(name)
    with pytest.raises(UserError, match=r"mine/repo has layers\.0"):
        SparseAutoencoder.from_pretrained(copied, subfolder="layers.7")


def test_a_run_of_several_sites_lists_its_sites(tmp_path: Path) -> None:
    for site in ("blocks.2.resid_post", "blocks.10.resid_post"):
        SparseAutoencoder(4, SAEConfig(8, sparsity=TopK(2))).save_pretrained(tmp_path / site)
        (tmp_path / site / "index").mkdir()
        (tmp_path / site / "index" / "top_examples.safetensors").touch()
    with pytest.raises(UserError, match=r"2 SAEs.*: blocks\.2\.resid_post, blocks\.10\.resid_post"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_only_the_chosen_files_are_asked_for(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, asked = hub, []

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=each) for each in SPARSIFY])

    def fetch(repository: str, **options: object) -> str:
        asked.append((repository, options["allow_patterns"], options["revision"]))
        return str(root)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: listing)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    SparseAutoencoder.from_pretrained("org/repo/layers.9", revision="v1")
    assert asked == [("org/repo", ["layers.9/sae.safetensors", "layers.9/cfg.json"], "v1")]
