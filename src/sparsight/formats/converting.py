"""Convert from one format into another, and prove that nothing was lost."""

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
"""Number of vectors on which the written SAE is compared."""
TOLERANCE = 1e-4
"""Largest relative difference of reconstructions; folding into the weights rounds to float32."""


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        path: the folder.
        difference: ‖x̂ − x̂'‖ / ‖x̂‖ between the SAE and the one that was read back.
    """

    path: Path
    difference: float


def convert(
    sae: SparseAutoencoder, to: str, out: str | Path, *, approximate: bool = False
) -> Conversion:
    """Write an SAE in a format, read it back, and compare the two.

    Args:
        sae: any SAE.
        to: name of the format; "sparsight" is our own.
        out: folder, empty or new.
        approximate: also write a TopK with a ReLU to formats whose TopK has none.

    Raises:
        UserError: the format does not exist or cannot express the SAE, or `out` is not empty.
        SparsightError: writing failed, or what was read back differs.
    """
    out = Path(out)
    writers = [OWN, *(format.name for format in formats() if format.can_save)]
    if to not in writers:
        raise UserError(f"{to!r} is not a format that can be written; choose {', '.join(writers)}.")
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
    one = copy.deepcopy(one).eval()  # the caller may be training it
    x = _typical_vectors(one)
    with torch.no_grad():
        expected, actual = one(x).x_hat, other.to(one.W_enc.device)(x).x_hat
    return float((expected - actual).norm() / expected.norm().clamp(min=1e-30))


def _typical_vectors(sae: SparseAutoencoder) -> Float[Tensor, "vectors d_in"]:
    """Draw normal vectors with the mean and scale of the data that the SAE was trained on."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(COMPARED, sae.d_in, generator=generator).to(sae.W_enc.device)
    return z * wide(sae.normaliser.scale) + wide(sae.normaliser.mean)


def _without_relu(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Return a copy whose TopK keeps negative values; everything else stays."""
    sparsity = sae.config.sparsity
    if not isinstance(sparsity, TopK):
        return sae
    other = copy.deepcopy(sae)
    other.config = dataclasses.replace(
        sae.config, sparsity=dataclasses.replace(sparsity, rectify=False)
    )
    return other
