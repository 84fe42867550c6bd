"""Load an SAE from wherever it is: a folder of ours, another project's checkpoint, the Hub."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsight.devices import choose_device
from sparsight.formats.base import Candidate
from sparsight.formats.places import find
from sparsight.formats.registry import read
from sparsight.progress import logger
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.files import CONFIG, WEIGHTS, is_own, load_own


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    filename: str | None = None,
    device: str | torch.device | None = None,
) -> SparseAutoencoder:
    """Read an SAE, ours or another project's, from a folder, a file or the Hub.

    The contents of the files determine the format; see `sparsight.formats`. How another project's
    checkpoint was read is logged (logger "sparsight") and kept in `metadata["source"]`.

    Args:
        name: a path, or a place on the Hub: "org/repo", "org/repo/folder", "org/repo/file.pt".
        revision: revision on the Hub.
        subfolder: folder within the folder or repository.
        filename: file within that.
        device: where to put the SAE; by default the CPU.

    Raises:
        UserError: torch finds no such device, there is no SAE, its format is unknown, or it has a
            part that Sparsight does not support.
        SparsightError: a file is damaged.
    """
    target = None if device is None else choose_device(device)
    place = find(name, revision=revision, subfolder=subfolder, filename=filename)
    if place.is_dir() and not is_own(place):
        place = Candidate(place, str(name)).one()
    folder = place if place.is_dir() else place.parent
    if place in (folder, folder / CONFIG, folder / WEIGHTS) and is_own(folder):
        sae = load_own(folder)
    else:
        sae = _foreign(place, str(name))
    return sae if target is None else sae.to(target)


def _foreign(place: Path, name: str) -> SparseAutoencoder:
    checkpoint = read(place, name)
    sae = checkpoint.build()
    where = (sae.metadata.get(key) for key in ("site", "target_site", "tokens"))
    model = (sae.metadata.get("model") or {}).get("id")
    parts = [
        f"{sae.n_latents:,} latents of width {sae.d_in:,}",
        sae.config.sparsity.describe(training=False),
        *(str(part) for part in (model, *where) if part),
    ]
    notes = f" ({'; '.join(checkpoint.notes)})" if checkpoint.notes else ""
    logger().info("%s: read as %s: %s%s", name, checkpoint.format, ", ".join(parts), notes)
    if checkpoint.unknown:
        logger().warning(
            "%s: not understood, and not used: %s", name, ", ".join(checkpoint.unknown)
        )
    return sae
