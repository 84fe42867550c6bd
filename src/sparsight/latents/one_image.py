"""All latents that fire in one image: of the collection or any other, and per patch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float32, Int64
from PIL import Image

from sparsight.errors import UserError
from sparsight.images import ImageInfo
from sparsight.latents.heatmaps import has_heatmaps
from sparsight.latents.index import LatentIndex
from sparsight.notebooks import html_grid, need_pandas
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.vision import VisionModel
from sparsight.vision.queries import read_query

if TYPE_CHECKING:
    import pandas

Latents = Int64[np.ndarray, " n"]
Values = Float32[np.ndarray, " n"]

SHOWN = 20
"""Latents that a notebook shows."""


@dataclass(frozen=True)
class PatchLatents:
    """The latents that are active at one patch.

    Attributes:
        row: row of the patch, 0 at the top.
        column: column of the patch.
        latents: the latents, strongest first.
        activations: their activations.
    """

    row: int
    column: int
    latents: tuple[int, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class ImageLatents:
    """The latents that fire in one image, strongest first.

    Attributes:
        info: id, origin, label and caption of the image.
        image: its place in the source of the index; None if it is not one of its images.
        latents: numbers of the latents.
        activations: the strongest activation of each in the image.
        positions: the first position that has it, among those that the SAE reads.
        index: the index that knows the latents.
        code: the code of the image, one row per position that the SAE reads; None if only the
            strongest activations are known.
    """

    info: ImageInfo
    image: int | None
    latents: Int64[np.ndarray, " n"]
    activations: Float32[np.ndarray, " n"]
    positions: Int64[np.ndarray, " n"]
    index: LatentIndex = field(compare=False)
    code: SparseCode | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def table(self) -> pa.Table:
        """One row per latent, strongest first: the columns of the index's table, `activation`,
        `relative` (the activation over the latent's largest one in the index) and `position`.
        """
        table = self.index.table.take(self.latents)
        largest = table["max_activation"].to_numpy()
        relative = np.divide(
            self.activations, largest, out=np.full(len(self), np.nan), where=largest > 0
        )
        shares = pa.array(relative, mask=np.isnan(relative))
        table = table.add_column(1, "activation", pa.array(self.activations))
        table = table.add_column(2, "relative", shares)
        return table.add_column(3, "position", pa.array(self.positions))

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches; None if the SAE reads no patches."""
        grid = self.index.manifest["model"].get("patch_grid")
        if not grid or not has_heatmaps(self.index.tokens, self.index.site):
            return None
        return int(grid[0]), int(grid[1])

    def patch_at(self, position: int) -> tuple[int, int] | None:
        """Return row and column of the patch at a position; None if no patch is there."""
        if self.grid is None:
            return None
        rows, columns = self.grid
        patch = position - (int(self.index.manifest["n_tokens"]) - rows * columns)
        return None if patch < 0 else divmod(patch, columns)

    def patches(self, n: int | None = None) -> list[PatchLatents]:
        """Return the strongest latents of each patch, in reading order.

        Args:
            n: number of latents per patch; default: every active one.

        Raises:
            UserError: the SAE reads no patches, or only the strongest activations of the image are
                known.
        """
        if self.grid is None:
            raise UserError(
                f"{self.index.folder}: the SAE reads {self.index.tokens!r} at {self.index.site}, "
                "which has no patches."
            )
        if self.code is None:
            raise UserError(
                "The latents of each patch need the image's code; give its code, or SAE and model."
            )
        rows, columns = self.grid
        first = len(self.code) - rows * columns
        return [
            PatchLatents(i // columns, i % columns, *strongest_of(self.code, first + i, n))
            for i in range(rows * columns)
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """Return `table` as a pandas data frame.

        Raises:
            MissingExtra: pandas is not installed.
        """
        need_pandas()
        return self.table.to_pandas()

    def __repr__(self) -> str:
        rows = self.table.select(["latent", "activation", "name"]).slice(0, 3).to_pylist()
        first = [f"{row['name'] or row['latent']} {row['activation']:.2f}" for row in rows]
        more = ", …" if len(self) > len(first) else ""
        return f"ImageLatents({self.info.id!r}, {len(self)} latents: {', '.join(first)}{more})"

    def _repr_html_(self) -> str:
        columns = ["latent", "activation", "relative", "n_active_images", "name"]
        rows = self.table.select(columns).slice(0, SHOWN).to_pylist()
        hidden = len(self) - len(rows)
        return html_grid(
            ["latent", "activation", "of its largest", "images", "name"],
            [
                [str(row["latent"]), f"{row['activation']:.3f}",
                 "" if row["relative"] is None else f"{row['relative']:.0%}",
                 f"{row['n_active_images']:,}", row["name"] or ""]
                for row in rows
            ],
            f"{self.info.id}" + (f": and {hidden} more latents" if hidden else ""),
        )  # fmt: skip


def image_latents(
    index: LatentIndex,
    image: int | str | Path | Image.Image,
    *,
    sae: SparseAutoencoder | None = None,
    model: VisionModel | None = None,
    code: SparseCode | None = None,
) -> ImageLatents:
    """Find all latents that fire in one image.

    Without `code` or a model, the latents of an image of the collection come from the posting lists
    of the index, without the patches.

    Args:
        index: what is known about the latents.
        image: place in the source, or id, of an image of the collection; or any image, or a path to
            one, which needs `sae` and `model`.
        sae: the SAE of the index.
        model: the model that the SAE reads.
        code: the code of the image, such as `CodeStore.image(place)`.

    Raises:
        UserError: the image does not exist or cannot be read; SAE, model or code belong to
            something else; or the index has format version 1, which needs `code` or a model.
    """
    if (sae is None) != (model is None):
        raise UserError("Give both an SAE and its model, or neither.")
    if isinstance(image, str) and (place := place_of(index, image)) is not None:
        image = place
    elif isinstance(image, str):
        if not Path(image).is_file():
            raise UserError(
                f"{image}: is neither the id of an image in {index.folder}, nor an image file."
            )
        image = Path(image)
    place = image if isinstance(image, int) else None
    if isinstance(image, int):
        info = index.info(image)
    elif isinstance(image, Path):
        info = ImageInfo(id=image.name, uri=str(image))
    else:
        info = ImageInfo(id="image", uri="")
    if code is None and sae is not None and model is not None:
        pixels = _opened(index, image, model)
        code = _encoded(index, sae, model, pixels)
    if code is not None:
        return ImageLatents(info, place, *_strongest(index, code), index, code)
    if place is None:
        raise UserError(f"{info.id}: an image outside the collection needs an SAE and its model.")
    return ImageLatents(info, place, *_listed(index, place), index)


def place_of(index: LatentIndex, id: str) -> int | None:
    """Return the place in the source of the image with an id; None if there is none."""
    row = pc.index(index.images["id"], id).as_py()
    return None if row < 0 else int(index.image_places[row])


def strongest_of(
    code: SparseCode, row: int, n: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the latents that are active on one row of a code, strongest first, and activations."""
    own = slice(int(code.offsets[row]), int(code.offsets[row + 1]))
    values, order = code.values[own].float().sort(descending=True, stable=True)
    return tuple(code.indices[own][order][:n].tolist()), tuple(values[:n].tolist())


def _strongest(index: LatentIndex, code: SparseCode) -> tuple[Latents, Values, Latents]:
    """Return the latents of all rows of a code, the strongest first, with the largest activation of
    each and the first row that has it.
    """
    if code.n_latents != index.n_latents:
        raise UserError(
            f"The code has {code.n_latents} latents, but {index.folder} is about {index.n_latents}."
        )
    values = code.values.float().cpu().numpy()
    order = np.argsort(-values, kind="stable")
    first = np.unique(code.indices.cpu().numpy()[order], return_index=True)[1]
    chosen = order[np.sort(first)]
    latents = code.indices.cpu().numpy()[chosen].astype(np.int64)
    return latents, values[chosen], code.rows.cpu().numpy()[chosen].astype(np.int64)


def _listed(index: LatentIndex, place: int) -> tuple[Latents, Values, Latents]:
    """Return the same from the posting lists."""
    latents, values = index.by_image.row(place)
    order = np.argsort(-values, kind="stable")
    lists = index.by_latent
    assert lists.tokens is not None  # lists by latent have positions
    positions = [
        lists.tokens[int(lists.offsets[latent]) + np.searchsorted(lists.row(latent)[0], place)]
        for latent in latents[order].tolist()
    ]
    return latents[order].astype(np.int64), values[order], np.array(positions, dtype=np.int64)


def _opened(index: LatentIndex, image: int | Path | Image.Image, model: VisionModel) -> Image.Image:
    if isinstance(image, int):
        return index.picture(image)
    if isinstance(image, Image.Image):
        return image
    return read_query(image, model.min_side)


@torch.no_grad()
def _encoded(
    index: LatentIndex, sae: SparseAutoencoder, model: VisionModel, image: Image.Image
) -> SparseCode:
    """Return the code of one image, one row per position."""
    index.check_sae(sae)
    known = index.manifest["model"].get("weights_hash")
    if known not in (None, model.weights_hash):
        raise UserError(
            f"{index.folder}: was built with another model ({index.manifest['model'].get('id')}); "
            f"the weights of {model.id} differ."
        )
    pixels = model.transform(image.convert("RGB"))[None]
    tokens: Any = index.tokens
    x = model.read(pixels, [index.site], tokens)[index.site][0].float()
    return sae.encode(x.to(sae.W_enc.device))
