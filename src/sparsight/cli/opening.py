"""What flags name: a model, the SAEs of some folders, an index of latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsight.cli.options import ModelOptions
from sparsight.devices import choose_device
from sparsight.latents import LatentIndex
from sparsight.latents.run_files import find_runs
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model


def open_model(id: str, options: ModelOptions) -> VisionModel:
    """The model of an id, as the options want it to run."""
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
    """Id and options of an SAE's model, run as it was: revision, dtype, size of decoded JPEGs.

    Args:
        about: what the SAE says of its model; {} where it says nothing.
        options: win where they are given.
        named: the model's id; default the SAE's own.
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
    """The SAEs in some folders, by their own folder, on `device` (default a GPU if there is one).

    Raises:
        UserError: a folder is not there, or holds none.
    """
    place = choose_device(device, float64=True)
    return {
        folder: SparseAutoencoder.from_pretrained(folder, device=place)
        for folder in find_runs(runs)
    }


def open_index(named: Path | None, folder: Path, sae: SparseAutoencoder) -> LatentIndex | None:
    """The index that was named, else the one in an SAE's folder, if it is there."""
    place = named or folder / "index"
    if named is None and not (place / "manifest.json").exists():
        return None
    return LatentIndex.open(place, sae)
