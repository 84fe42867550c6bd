"""The data to measure on: activations of one site in order, read as often as needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.activations import ActivationStore, seen_in_training
from sparsight.activations.sampling import sampled
from sparsight.config import check_positive
from sparsight.errors import UserError
from sparsight.images import ImageSource, sample_places
from sparsight.sae import SparseAutoencoder

if TYPE_CHECKING:
    from sparsight.activations import ActivationSource

CACHE_BYTES = 512 << 20
"""Activations up to this size are kept between passes, so that a live model runs only once."""


class Batch(NamedTuple):
    """Activations of consecutive images."""

    images: Int[Tensor, " batch"]
    """Places of the images in their source."""

    x: Float[Tensor, "batch tokens d_in"]
    """Activations in the units of the model, float32."""

    y: Float[Tensor, "batch tokens d_out"]
    """The target of the reconstruction: `x`, or for a transcoder the activations of its target."""


@dataclass(frozen=True)
class Layout:
    """Where patches and CLS are among an image's vectors.

    Attributes:
        n_tokens: vectors per image.
        n_prefix: number of these before the first patch; None without a grid of patches (one vector
            per image).
        has_cls: whether the first is the CLS position.
        grid: rows and columns of patches; None without patches.
    """

    n_tokens: int
    n_prefix: int | None
    has_cls: bool
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, source: ActivationSource, site: str) -> Layout:
        """Return the layout of a site, from what the activations record about their model."""
        n_tokens, tokens = source.n_tokens[site], source.tokens
        rows, columns = source.model_info.get("patch_grid") or (0, 0)
        n_prefix = n_tokens - rows * columns
        expected = {"all": int(source.model_info.get("n_prefix") or 0), "patches": 0}
        if rows and expected.get(tokens) == n_prefix:
            return cls(n_tokens, n_prefix, n_prefix > 0, (rows, columns))
        return cls(n_tokens, None, False, None)


class Passes:
    """The batches of a site, for several passes; kept in memory if they are small enough.

    Args:
        source: the activations.
        site: the site.
        target: the site that a transcoder predicts.
        max_images: size of a random sample of images; default: all images.
        seed: seed of the sample.
        batch_images: images per batch.
        device: device of the batches.
        cache_bytes: largest size to keep in memory.
    """

    def __init__(
        self,
        source: ActivationSource,
        site: str,
        *,
        target: str | None = None,
        max_images: int | None = None,
        seed: int = 0,
        batch_images: int = 64,
        device: torch.device | str = "cpu",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        check_positive(max_images=max_images, batch_images=batch_images)
        source = sampled(source, max_images, seed)
        self.source = source
        self.site = site
        self.target = target or site
        self.layout = Layout.of(source, site)
        self.d_in = source.d_in(site)
        self.d_out = source.d_in(self.target)
        if source.n_tokens[self.target] != source.n_tokens[site]:
            raise UserError(
                f"{site} has {source.n_tokens[site]} vectors per image, {target} "
                f"{source.n_tokens[self.target]}: a transcoder needs the same number at both."
            )
        self.batch_images = batch_images
        self.device = torch.device(device)
        self._chosen: npt.NDArray[np.bool_] | None = None  # for sources without views
        self.n_images = source.n_images
        if max_images is not None and max_images < source.n_images:
            self._chosen = np.zeros(source.n_images, dtype=bool)
            self._chosen[sample_places(source.n_images, max_images, seed)] = True
            self.n_images = max_images
        width = self.d_in if self.target == site else self.d_in + self.d_out
        size = 4 * self.n_images * self.layout.n_tokens * width
        self._keep = size <= cache_bytes
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from map(self._placed, self._kept)
            return
        kept: list[Batch] = []
        n_read = n_seen = 0
        sites = list(dict.fromkeys((self.site, self.target)))
        for read in self.source.ordered(sites, batch_images=self.batch_images):
            x, y = (read.activations[site] for site in (self.site, self.target))
            batch = Batch(read.image_indices, x, y)
            if self._chosen is not None:
                first, n_read = n_read, n_read + len(x)
                rows = torch.from_numpy(self._chosen[first:n_read])
                batch = Batch(batch.images[rows], x[rows], x[rows] if y is x else y[rows])
                if not len(batch.x):
                    continue
            n_seen += len(batch.x)
            if self._keep:
                kept.append(batch)
            yield self._placed(batch)
        # Images may fail to load in the first pass.
        self.n_images = n_seen
        if self._keep:
            self._kept = kept

    def _placed(self, batch: Batch) -> Batch:
        x = batch.x.to(self.device)
        return Batch(batch.images, x, x if batch.y is batch.x else batch.y.to(self.device))

    def first_vectors(self, n: int) -> Float[Tensor, "at_most_n d_in"]:
        """Return the first `n` vectors, whatever the batches."""
        found: list[Tensor] = []
        per_image = self.layout.n_tokens
        n_images = -(-n // per_image)
        batches = self._kept if self._kept is not None else self
        for batch in itertools.islice(batches, -(-n_images // self.batch_images)):
            found.append(batch.x.flatten(0, 1))
        return torch.cat(found)[:n].to(self.device)


def find_site(sae: SparseAutoencoder, source: ActivationSource, site: str | None) -> str:
    """Return the site to measure, after checking that the SAE belongs there.

    Raises:
        UserError: the activations lack the site, or their width, positions or model differ.
    """
    wanted = site or sae.metadata.get("site")
    if wanted is None and len(source.sites) == 1:
        wanted = source.sites[0]
    if wanted is None:
        raise UserError(
            "The SAE does not name the site it was trained on; give site=…, one of: "
            f"{', '.join(source.sites)}."
        )
    wanted = source.canonical_site(str(wanted))
    if source.d_in(wanted) != sae.d_in:
        raise UserError(
            f"{wanted}: the activations have {source.d_in(wanted)} dimensions, but the SAE takes "
            f"{sae.d_in}."
        )
    tokens = sae.metadata.get("tokens")
    if tokens is not None and tokens != source.tokens:
        raise UserError(
            f"The SAE was trained on tokens={tokens!r}; these activations are {source.tokens!r}."
        )
    trained, given = sae.metadata.get("model") or {}, source.model_info
    hashes = {each.get("weights_hash") for each in (trained, given)} - {None}
    if len(hashes) > 1:
        raise UserError(
            f"The SAE was trained on {trained.get('id')}, but these activations are from "
            f"{given.get('id')}, whose weights differ."
        )
    return wanted


def find_target(sae: SparseAutoencoder, source: ActivationSource) -> str | None:
    """Return the site that a transcoder predicts; None for an autoencoder.

    Raises:
        UserError: the site is unknown, not among the activations, or of another width.
    """
    if not sae.is_transcoder:
        return None
    named = sae.metadata.get("target_site")
    if named is None:
        raise UserError(
            "The transcoder does not name the site that it predicts (it has no target_site)."
        )
    target = source.canonical_site(str(named))
    if source.d_in(target) != sae.d_out:
        raise UserError(
            f"{target}: the activations have {source.d_in(target)} dimensions, but the transcoder "
            f"gives {sae.d_out}."
        )
    return target


def images_of(source: ActivationSource) -> ImageSource:
    """Return the images of activations; for a view of a store, only those of the view.

    Raises:
        UserError: the images no longer exist, or have changed.
    """
    images = source.source()
    if isinstance(source, ActivationStore) and source.n_images < len(images):
        return images.select(source.image_indices)
    return images


def trained_on(sae: SparseAutoencoder, source: ActivationSource) -> bool | None:
    """Return whether the SAE was trained on the images of the activations; None if unknown."""
    return seen_in_training(sae.metadata, source)


def held_out(sae: SparseAutoencoder, source: ActivationSource) -> bool:
    """Return whether the activations are of images that were held out from training."""
    same = sae.metadata.get("images") == source.model_info.get("images")
    return same and trained_on(sae, source) is False
