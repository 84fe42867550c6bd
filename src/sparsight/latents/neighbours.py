"""The closest latents of each latent: by decoder row, by co-activation, in the same SAE or others.

`Coactivation` (coactivation.py) correlates activations; `nearest_others` (nearest.py) compares
decoder rows; neighbour_tables.py keeps the tables of an index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool

from sparsight.errors import UserError
from sparsight.latents.coactivation import Coactivation
from sparsight.latents.index import LatentIndex
from sparsight.latents.nearest import nearest_rows
from sparsight.latents.neighbour_tables import KEPT, By, NeighbourTable, among_live
from sparsight.sae import SparseAutoencoder


def neighbours_across(
    index: LatentIndex,
    other: LatentIndex,
    *,
    by: By = "coactivation",
    latents: Sequence[int] | None = None,
    n: int = KEPT,
    saes: tuple[SparseAutoencoder, SparseAutoencoder] | None = None,
    quiet: bool = True,
) -> NeighbourTable:
    """Find the latents of another SAE, or another layer, that are closest to those of this one.

    Args:
        index: index of the SAE whose latents are asked about.
        other: index of the SAE whose latents are neighbours; for co-activation, of the same images.
        by: see `By`.
        latents: latents of `index`, one row of the table each; default: all of them.
        n: neighbours per latent.
        saes: both SAEs, for `by="decoder"`, which needs the same site and width; latents that never
            fire are nobody's neighbours.
        quiet: show no progress line.

    Returns:
        A table with one row per asked latent. For a few latents it takes milliseconds after one
        pass over the lists; to ask one by one, keep a `Coactivation(index, other)`.

    Raises:
        UserError: the indexes are of different images, or of different sites (decoder); a latent
            does not exist; an index has format 1.
    """
    asked = (
        range(index.n_latents) if latents is None else [index.checked(latent) for latent in latents]
    )
    if by == "coactivation":
        return Coactivation(index, other, sample=0 if latents is None else None).table(
            asked, n, quiet=quiet
        )
    if saes is None:
        raise UserError("Neighbours by decoder need both SAEs: saes=(sae, other_sae).")
    for sae, own in zip(saes, (index, other), strict=True):
        own.check_sae(sae)
    if index.site != other.site or saes[0].d_in != saes[1].d_in:
        raise UserError(
            f"Decoder rows of different spaces cannot be compared: {index.folder} is of "
            f"{index.site} (width {saes[0].d_in}), {other.folder} of {other.site} (width "
            f'{saes[1].d_in}). Use by="coactivation".'
        )
    live = live_latents(other)
    rows = saes[1].W_dec[torch.from_numpy(np.flatnonzero(live))]
    return among_live(nearest_rows(saes[0].W_dec[list(asked)], rows, n), live)


def live_latents(index: LatentIndex) -> Bool[np.ndarray, " latents"]:
    """Return which latents fire in an image of the index."""
    live: Bool[np.ndarray, " latents"] = index.table["n_active"].to_numpy() > 0
    return live
