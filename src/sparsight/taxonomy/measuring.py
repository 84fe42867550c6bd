"""What can be measured of every latent without labels: where it is active, and with what.

One pass over codes, in order, with the looks of the patches. Memory does not grow with the images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.image_maxima import image_maxima
from sparsight.sae import SparseCode
from sparsight.taxonomy.looks import N_COLOURS, N_TEXTURES, Looks

Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """Statistics of every latent; NaN where one does not exist.

    A share of variance is ε² (Kelley 1935): how much of the variance of a latent's activations goes
    along with a grouping of the patches (or images), freed of what chance alone would give.

    Attributes:
        images: number of images on which it is active.
        density: share of the images.
        evenness: (Σ a)² / (n Σ a²) over its strongest activations in the n images on which it is
            active: 1 if all are equal, low if few are strong and many weak.
        cls: share of its active vectors that lie before the patches.
        position: share of variance that goes along with the position of the patch.
        colour: the same for the colour of the patch.
        texture: the same for the texture of the patch.
        image: the same for the image: near 1 if it is active everywhere in some images.
        image_colour: share of the variance of the strongest activation in each image that goes
            along with the most frequent colour of the image's patches.
        image_texture: the same for their most frequent texture.
        area: mean share of the patches that are active, over images in which any is.
        moran: mean of Moran's I over these images, with the four neighbours of each patch.
        height: mean standard deviation of the active rows, in shares of the image's height.
        width: the same for columns and width.
        moved: mean distance of the centre of activity from its own mean over images, in shares of
            the diagonal.
    """

    images: Column
    density: Column
    evenness: Column
    cls: Column
    position: Column
    colour: Column
    texture: Column
    image: Column
    image_colour: Column
    image_texture: Column
    area: Column
    moran: Column
    height: Column
    width: Column
    moved: Column

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return len(self.images)

    def take(self, latents: npt.NDArray[np.int64]) -> Measures:
        """Return the measures of some latents."""
        return Measures(**{f.name: getattr(self, f.name)[latents] for f in fields(self)})


class Measuring:
    """Measures every latent, batch by batch.

    Args:
        n_latents: number of latents.
        n_tokens: vectors per image.
        grid: rows and columns of patches, which are the last of the vectors; None without patches.
    """

    def __init__(self, n_latents: int, n_tokens: int, grid: tuple[int, int] | None) -> None:
        self.n_latents, self.n_tokens, self.grid = n_latents, n_tokens, grid
        self.n_patches = grid[0] * grid[1] if grid else 0
        self.n_prefix = n_tokens - self.n_patches
        self.n_images = 0
        self._vectors = self._zeros(2)  # all active ones, and those before the patches
        self._total = self._zeros(2)  # sum and sum of squares over patches
        self._by = {
            "position": self._zeros(max(1, self.n_patches)),
            "colour": self._zeros(N_COLOURS),
            "texture": self._zeros(N_TEXTURES),
        }
        self._sizes = {name: torch.zeros(s.shape[1]).double() for name, s in self._by.items()}
        self._image_square = self._zeros(1)
        self._peak = self._zeros(3)  # images, sum and sum of squares of the strongest activation
        self._peak_by = {"colour": self._zeros(N_COLOURS), "texture": self._zeros(N_TEXTURES)}
        self._peak_sizes = {n: torch.zeros(s.shape[1]).double() for n, s in self._peak_by.items()}
        # Over images with an active patch: count, area, height, width, centre (2), its squares (2).
        self._shape = self._zeros(8)
        self._moran = self._zeros(2)

    def _zeros(self, columns: int) -> Float[Tensor, "n_latents columns"]:
        return torch.zeros(self.n_latents, columns, dtype=torch.float64)

    def add(self, batch: CodeBatch, looks: Looks | None) -> None:
        """Add the codes of the next images.

        Args:
            batch: the codes.
            looks: colours and textures of their patches; None if the images are not available.
        """
        code, n = batch.code, len(batch.image_indices)
        latent = code.indices.cpu().long()
        image = code.rows.cpu() // self.n_tokens
        token, value = code.rows.cpu() % self.n_tokens, code.values.cpu().double()
        self.n_images += n
        before = token < self.n_prefix
        _add(self._vectors, latent, torch.stack([torch.ones_like(value), before.double()], 1))
        self._add_peaks(code, looks)
        if not self.n_patches:
            return
        kept = ~before
        latent, image, value = latent[kept], image[kept], value[kept]
        patch = token[kept] - self.n_prefix
        _add(self._total, latent, torch.stack([value, value**2], dim=1))
        groups = {"position": torch.arange(self.n_patches).expand(n, -1)}
        if looks is not None:
            groups |= {"colour": looks.colour, "texture": looks.texture}
        for name, group in groups.items():
            sums = self._by[name]
            place = latent * sums.shape[1] + group[image, patch]
            sums.view(-1).index_add_(0, place, value)
            self._sizes[name] += torch.bincount(group.flatten(), minlength=sums.shape[1])
        self._add_shapes(latent, image, patch, value, n)

    def _add_peaks(self, code: SparseCode, looks: Looks | None) -> None:
        maxima = image_maxima(code, self.n_tokens)
        latent, image, peak = maxima.latent.cpu(), maxima.image.cpu(), maxima.value.cpu().double()
        _add(self._peak, latent, torch.stack([torch.ones_like(peak), peak, peak**2], dim=1))
        if looks is None:
            return
        for name, group in zip(("colour", "texture"), looks.of_images(), strict=True):
            sums = self._peak_by[name]
            sums.view(-1).index_add_(0, latent * sums.shape[1] + group[image], peak)
            self._peak_sizes[name] += torch.bincount(group, minlength=sums.shape[1])

    def _add_shapes(
        self,
        latent: Int[Tensor, " entries"],
        image: Int[Tensor, " entries"],
        patch: Int[Tensor, " entries"],
        value: Float[Tensor, " entries"],
        n: int,
    ) -> None:
        rows, columns = self.grid or (0, 0)
        pair, place = (latent * n + image).unique(return_inverse=True)
        y, x = (patch // columns + 0.5) / rows, (patch % columns + 0.5) / columns

        def total(values: Tensor) -> Tensor:
            return torch.zeros(len(pair)).double().index_add_(0, place, values.double())

        mass, square, count = total(value), total(value**2), total(torch.ones_like(value))
        latent_of = pair // n
        _add(self._image_square, latent_of, (mass**2)[:, None] / self.n_patches)
        # Activations may be negative (AbsTopK); places are weighted by their size.
        weight = value.abs()
        weights = total(weight).clamp(min=1e-300)
        centres = [total(weight * c) / weights for c in (y, x)]
        spreads = [
            (total(weight * c**2) / weights - m**2).clamp(min=0).sqrt()
            for c, m in zip((y, x), centres, strict=True)
        ]
        shape = [torch.ones_like(mass), count / self.n_patches, *spreads, *centres]
        _add(self._shape, latent_of, torch.stack([*shape, *(c**2 for c in centres)], dim=1))
        moran = self._morans(place * self.n_patches + patch, value, mass, square)
        defined = moran.isfinite()
        both = torch.stack([moran, torch.ones_like(moran)], dim=1)
        _add(self._moran, latent_of[defined], both[defined])

    def _morans(
        self,
        key: Int[Tensor, " entries"],
        value: Float[Tensor, " entries"],
        mass: Float[Tensor, " pairs"],
        square: Float[Tensor, " pairs"],
    ) -> Float[Tensor, " pairs"]:
        """Return Moran's I of each pair of latent and image (Moran 1950), over rook neighbours.

        Expanded around the mean, so that patches with activation 0 take no part:
        Σ w (a − m)(b − m) = Σ w a b − 2 m Σ deg a + m² W.
        """
        rows, columns = self.grid or (0, 0)
        n = self.n_patches
        key, order = key.sort()
        value = value[order]
        place, patch = key // n, key % n
        row, column = patch // columns, patch % columns
        cross = torch.zeros(len(mass), dtype=torch.float64)
        for step, inside in ((1, column < columns - 1), (columns, row < rows - 1)):
            found = torch.searchsorted(key, key + step).clamp(max=len(key) - 1)
            beside = inside & (key[found] == key + step)
            cross.index_add_(0, place[beside], value[beside] * value[found[beside]])
        degree = (row > 0).double() + (row < rows - 1) + (column > 0) + (column < columns - 1)
        weighted = torch.zeros(len(mass), dtype=torch.float64).index_add_(0, place, degree * value)
        edges = 2.0 * (rows * (columns - 1) + columns * (rows - 1))
        mean = mass / n
        variance = square - n * mean**2
        flat = variance <= 1e-12 * square
        along = 2 * cross - 2 * mean * weighted + mean**2 * edges
        return torch.where(flat, torch.nan, n / edges * along / variance.clamp(min=1e-300))

    def result(self) -> Measures:
        """Return the measures of all images so far."""
        images, peak, peak_square = self._peak.T
        active, before = self._vectors.T
        n = float(self.n_images * self.n_patches)
        total, square = self._total.T
        shown, area, height, width, y, x, yy, xx = self._shape.T
        moved = ((yy / shown - (y / shown) ** 2) + (xx / shown - (x / shown) ** 2)).clamp(min=0)
        shares = {
            name: explained(sums, self._sizes[name], total, square, n)
            for name, sums in self._by.items()
        }
        peaks = {
            name: explained(sums, self._peak_sizes[name], peak, peak_square, float(self.n_images))
            for name, sums in self._peak_by.items()
        }
        between = self._image_square[:, 0] - total**2 / max(n, 1)
        within = (square - total**2 / max(n, 1)).clamp(min=1e-300)
        ratio = torch.where(square > 0, between / within, torch.nan)
        columns = {
            "images": images,
            "density": images / max(self.n_images, 1),
            "evenness": peak**2 / (images * peak_square),
            "cls": before / active,
            "position": shares["position"],
            "colour": shares["colour"],
            "texture": shares["texture"],
            "image": _adjusted(ratio, n, float(self.n_images)),
            "image_colour": peaks["colour"],
            "image_texture": peaks["texture"],
            "area": area / shown,
            "moran": self._moran[:, 0] / self._moran[:, 1],
            "height": height / shown,
            "width": width / shown,
            "moved": (moved / 2).sqrt(),
        }
        return Measures(**{name: column.numpy() for name, column in columns.items()})


def explained(
    sums: Float[Tensor, "n_latents groups"],
    sizes: Float[Tensor, " groups"],
    total: Float[Tensor, " n_latents"],
    square: Float[Tensor, " n_latents"],
    n: float,
) -> Float[Tensor, " n_latents"]:
    """Return ε², the share of variance that goes along with a grouping; NaN without variance.

    Args:
        sums: sum of the activations in each group.
        sizes: number of values in each group, zeros included.
        total: sum of all activations.
        square: sum of their squares.
        n: number of values.
    """
    filled = sizes > 0
    if n <= 1 or not bool(filled.any()):
        return torch.full_like(total, torch.nan)
    between = (sums[:, filled] ** 2 / sizes[filled]).sum(dim=1) - total**2 / n
    within = square - total**2 / n
    some = within > 1e-12 * square
    ratio = torch.where(some, between / within.clamp(min=1e-300), torch.nan)
    return _adjusted(ratio, n, float(filled.sum()))


def _adjusted(ratio: Tensor, n: float, groups: float) -> Tensor:
    """Free η² of chance: 1 − (1 − η²)(n − 1) / (n − groups)."""
    if n <= groups:
        return torch.full_like(ratio, torch.nan)
    return 1 - (1 - ratio) * (n - 1) / (n - groups)


def _add(
    sums: Float[Tensor, "n_latents columns"],
    latent: Int[Tensor, " entries"],
    values: Float[Tensor, "entries columns"],
) -> None:
    sums.index_add_(0, latent, values.double())
