"""From one format into another, and proof that nothing was lost."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.folders import new_folder
from sparsight.formats.registry import OWN, find, formats, read
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.files import load_own, save
from sparsight.sae.precision import wide
from sparsight.sae.sparsity import TopK

COMPARED = 256
"""Vectors that the written SAE is compared on."""
TOLERANCE = 1e-4
"""Largest relative difference of reconstructions; float32 rounds what is folded into weights."""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        path: the folder.
        difference: ‖x̂ − x̂'‖ / ‖x̂‖ between the SAE and what was read back.
    """

    path: Path
    difference: float


def convert(
    sae: SparseAutoencoder, to: str, out: str | Path, *, approximate: bool = False
) -> Conversion:
    """Write an SAE in a format, read it back, and compare the two.

    Args:
        sae: any.
        to: name of the format; "sparsight" is our own.
        out: folder, empty or new.
        approximate: write a TopK with a ReLU for formats whose TopK has none, too.

    Raises:
        UserError: there is no such format, it cannot express the SAE, or `out` is not empty.
        SparsightError: it could not be written, or what was read back differs.
    """
    out = Path(out)
    writers = [OWN, *(format.name for format in formats() if format.can_save)]
    if to not in writers:
        raise UserError(f"{to!r} is no format that can be written, only: {', '.join(writers)}.")
    written = _without_relu(sae) if approximate else sae
    with new_folder(out) as partial:
        path = save(sae, partial) if to == OWN else find(to).save(written, partial)
        again = load_own(path) if to == OWN else read(path).build()
        difference = _difference(sae, again)
        if not (difference <= TOLERANCE or approximate):
            raise SparsightError(
                f"{out}: not written. What was read back differs by {difference:.1e} from the SAE. "
                "Please report this."
            )
    return Conversion(out / path.relative_to(partial), difference)


def _difference(one: SparseAutoencoder, other: SparseAutoencoder) -> float:
    one = copy.deepcopy(one).eval()  # whoever gave it may be training it
    x = _typical_vectors(one)
    with torch.no_grad():
        expected, found = one(x).x_hat, other.to(one.W_enc.device)(x).x_hat
    return float((expected - found).norm() / expected.norm().clamp(min=1e-30))


def _typical_vectors(sae: SparseAutoencoder) -> Float[Tensor, "vectors d_in"]:
    """Normal vectors around the mean and in the scale that the SAE was trained in."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(COMPARED, sae.d_in, generator=generator).to(sae.W_enc.device)
    return z * wide(sae.normaliser.scale) + wide(sae.normaliser.mean)


def _without_relu(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same with a TopK that keeps negative values; whatever else it is, as it is."""
    sparsity = sae.config.sparsity
    if not isinstance(sparsity, TopK):
        return sae
    other = copy.deepcopy(sae)
    other.config = dataclasses.replace(
        sae.config, sparsity=dataclasses.replace(sparsity, rectify=False)
    )
    return other
