"""`push_to_hub`: from a run to a repository on the Hub, or to a folder that looks like one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sparsight
from sparsight.config import check_seed
from sparsight.errors import UserError
from sparsight.files import atomic_path, json_bytes, read_json, write_bytes
from sparsight.folders import new_folder
from sparsight.latents.run_files import RunFiles, find_runs, read_run, run_names
from sparsight.latents.run_models import RunModels
from sparsight.latents.stored import find_stored, needs_model
from sparsight.publishing import hub
from sparsight.publishing.card import card_of, index_card
from sparsight.publishing.pictures import LatentPictures, latent_pictures
from sparsight.redaction import without_folders, without_folders_in
from sparsight.sae.files import CONFIG, WEIGHTS
from sparsight.text import without_surrogates
from sparsight.training import Run
from sparsight.vision import VisionModel

METRICS = "metrics.json"
README = "README.md"


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be uploaded.

    Attributes:
        repo_id: the repository.
        url: address of the commit; None after a dry run.
        files: size in bytes of each file, by path in the repository.
        notes: what the cards lack, and the command that makes it.
    """

    repo_id: str
    url: str | None
    files: Mapping[str, int]
    notes: tuple[str, ...]


def push_to_hub(
    run: Run | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    latents: int = 12,
    seed: int = 0,
    model: VisionModel | str | None = None,
    license: str | None = None,
    dry_run: str | Path | None = None,
    token: str | None = None,
    quiet: bool = False,
) -> Push:
    """Upload a finished run to the Hugging Face Hub, with a model card.

    For each SAE, the upload consists of `config.json`, `sae.safetensors`, `metrics.json` if it was
    evaluated, the card (`README.md`), and `pictures/` of some latents if it was indexed. Several
    SAEs get one folder each, and a README that lists them;
    `SparseAutoencoder.from_pretrained("org/name/folder")` loads one. Paths on this machine are cut
    to their last part throughout.

    Args:
        run: a run, or its folder; or a folder with several runs, such as a sweep.
        repo_id: ORG/NAME; it is created if it does not exist.
        private: make it private.
        revision: branch; it is created if it does not exist.
        message: message of the commit.
        latents: number of latents to show per SAE, with the images on which it was indexed.
        seed: has no effect any more: no latent is drawn at random.
        model: makes the heatmaps if neither codes nor activations of the images are on disk; by
            default the model that the index names.
        license: the licence, as the Hub spells it, e.g. "mit".
        dry_run: write the files into this new folder and upload nothing.
        token: token for the Hub; by default this machine's.
        quiet: show no progress bars.

    Raises:
        UserError: there is no finished run, no token, or no right to write there; the repository
            holds something else; or `dry_run` is not empty.
        SparsightError: a file of the run is damaged, or the Hub cannot be reached.
    """
    check_seed(seed)
    if latents < 0:
        raise UserError(f"latents is {latents}; it must be 0 or more.")
    hub.check_repo_id(repo_id)
    root = run.out if isinstance(run, Run) else Path(run)
    choice = _Choice(latents, seed, model, revision, license, quiet)
    url = None
    if dry_run is not None:
        with new_folder(Path(dry_run)) as folder:
            runs = _runs(root)
            files = _files(runs, repo_id, choice)
            _write(folder, files)
    else:
        hub.check_ready(token)
        runs = _runs(root)
        files = _files(runs, repo_id, choice)
        url = hub.upload(
            repo_id,
            files,
            runs,
            message=message or f"Push with Sparsight {sparsight.__version__}",
            private=private,
            revision=revision,
            token=token,
            quiet=quiet,
        )
    sizes = {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size
        for path, content in files.items()
    }
    notes = [f"{run.name}: {lack}" for run in runs.values() for lack in run.missing]
    return Push(repo_id, url, sizes, tuple(notes))


@dataclass(frozen=True)
class _Choice:
    """What the caller of `push_to_hub` chose about the cards."""

    latents: int
    seed: int
    model: VisionModel | str | None
    revision: str | None
    license: str | None
    quiet: bool


def _files(runs: Mapping[str, RunFiles], repo_id: str, choice: _Choice) -> dict[str, bytes | Path]:
    """Return what goes into the repository, by path there."""
    models = RunModels(choice.model)
    files: dict[str, bytes | Path] = {}
    for folder, run in runs.items():
        start, place = (f"{folder}/", f"{repo_id}/{folder}") if folder else ("", repo_id)
        pictures = _pictures(run, models, n=choice.latents, seed=choice.seed, quiet=choice.quiet)
        card = card_of(run, place, pictures, revision=choice.revision, license=choice.license)
        files[start + README] = without_surrogates(without_folders(card.text())).encode()
        files[start + CONFIG] = _config(run)
        files[start + WEIGHTS] = run.folder / WEIGHTS
        if run.metrics:
            files[start + METRICS] = json_bytes(without_folders_in(run.metrics))
        for picture in pictures.pictures if pictures else ():
            files[start + picture.file] = picture.png
    if "" not in runs:
        card_text = index_card(runs, repo_id, revision=choice.revision, license=choice.license)
        files[README] = without_surrogates(without_folders(card_text)).encode()
    return files


def _runs(root: Path) -> dict[str, RunFiles]:
    """Return the SAEs by their folders in the repository; a single one is at its root."""
    folders_of_runs = find_runs(root)
    names = run_names(folders_of_runs)
    folders = (
        [folder.relative_to(root).as_posix() for folder in folders_of_runs]
        if folders_of_runs[1:]
        else [""]
    )
    return {
        place: read_run(folder, name)
        for place, folder, name in zip(folders, folders_of_runs, names, strict=True)
    }


def _pictures(
    run: RunFiles, models: RunModels, *, n: int, seed: int, quiet: bool
) -> LatentPictures | None:
    if run.index is None or n == 0:
        return None
    stored = find_stored(run)
    model = models.of(run, needed=needs_model(run, stored))
    return latent_pictures(run, model, n=n, seed=seed, quiet=quiet, stored=stored)


def _config(run: RunFiles) -> bytes:
    path = run.folder / CONFIG
    description = read_json(path) if path.exists() else {}
    if description.get("format") != "sparsight-sae":
        raise UserError(
            f"{run.folder}: holds an autoencoder of another project. `sparsight convert "
            f"{run.folder} --out FOLDER` makes it one of Sparsight's; push that."
        )
    return json_bytes(without_folders_in(description))


def _write(folder: Path, files: hub.Files) -> None:
    for path, content in files.items():
        if isinstance(content, bytes):
            write_bytes(folder / path, content)
        else:
            with atomic_path(folder / path) as temporary:
                shutil.copyfile(content, temporary)
