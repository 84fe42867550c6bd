"""Opening what flags name: a model, the SAEs of folders, an index of latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsight.cli.options import ModelOptions
from sparsight.devices import choose_device
from sparsight.errors import UserError
from sparsight.latents import LatentIndex
from sparsight.latents.run_files import WEIGHTS, find_runs
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model


def open_model(id: str, options: ModelOptions) -> VisionModel:
    """Load the model with an id, with the options' device, dtype and revision."""
    return load_model(
        id,
        device=options.device,
        dtype=options.model_dtype,
        revision=options.revision,
        scale_jpegs=options.scale_jpegs,
    )


def as_trained(
    about: Mapping[str, Any], options: ModelOptions, named: str | None = None
) -> tuple[str | None, ModelOptions]:
    """Return id and options to run an SAE's model as in training: revision, dtype, JPEG size.

    Args:
        about: the SAE's metadata about its model; {} if it has none.
        options: take precedence where they are given.
        named: the model's id; the SAE's own by default.
    """
    id = named or about.get("id")
    own = about.get("revision") if id == about.get("id") else None
    return id, replace(
        options,
        revision=options.revision or own,
        model_dtype=options.model_dtype or about.get("dtype"),
        scale_jpegs=options.scale_jpegs or "jpeg_min_side" in (about.get("preprocessing") or {}),
    )


def open_saes(runs: Iterable[Path], device: str | None = None) -> dict[Path, SparseAutoencoder]:
    """Load the SAEs in folders, by run folder, on `device` (by default a GPU if there is one).

    Raises:
        UserError: a folder does not exist, or holds no SAE.
    """
    place = choose_device(device, float64=True)
    return {
        folder: SparseAutoencoder.from_pretrained(folder, device=place)
        for folder in find_runs(runs)
    }


def open_index(named: Path | None, folder: Path, sae: SparseAutoencoder) -> LatentIndex | None:
    """Open the named index, or else the one in an SAE's folder if it exists."""
    place = named or folder / "index"
    if named is None and not (place / "manifest.json").exists():
        return None
    return LatentIndex.open(place, sae)


def open_run_index(
    run: Path, named: Path | None = None, device: str | None = "cpu"
) -> tuple[LatentIndex, SparseAutoencoder | None]:
    """Open the index of a run, and check that it is about the run's SAE.

    Args:
        run: folder of the run, or of an index.
        named: folder of another index of the run's SAE.
        device: where to put the SAE.

    Returns:
        The index, and the SAE; None if the folder holds only an index.

    Raises:
        UserError: the folder does not exist or has no index, or the index is of another SAE.
    """
    if not run.is_dir():
        raise UserError(
            f"{run}: does not exist. Give a run folder, as written by `sparsight train`."
        )
    place = named or run
    if not any((folder / "manifest.json").exists() for folder in (place, place / "index")):
        raise UserError(f"{place}: holds no latent index; `sparsight index {run}` builds it.")
    has_sae = (run / WEIGHTS).exists()
    on = choose_device(device, float64=True)
    sae = SparseAutoencoder.from_pretrained(run, device=on) if has_sae else None
    return LatentIndex.open(place, sae), sae
