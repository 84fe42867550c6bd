"""Activations at the patches of single images, read from files of earlier steps."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sparsight.activations import ActivationStore
from sparsight.errors import SparsightError
from sparsight.files import read_json
from sparsight.latents.codes import CodeStore
from sparsight.latents.heatmaps import has_heatmaps, latent_values
from sparsight.latents.index import LatentIndex
from sparsight.latents.run_files import RunFiles
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.vision.geometry import seen_picture

CODES, MANIFEST = "codes", "manifest.json"
BATCH = 16
"""Images per encoded batch."""


Heat = Float[Tensor, "rows columns"]


@runtime_checkable
class StoredCodes(Protocol):
    """A place to read the activations of latents in single images from."""

    def values(
        self, wanted: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens latents"]]]:
        """Yield each image with its latents' activations at all tokens; the last tokens are
        patches.

        Args:
            wanted: latents, by image.
        """

    def code(self, image: int) -> SparseCode:
        """Return the code of one image, one row per token.

        Raises:
            UserError: it has no activations here.
        """


def find_stored(run: RunFiles) -> StoredCodes | None:
    """Find codes or activations of the images of a run's index, if they are on disk.

    The search covers `codes/` in the run, the store that the run was trained on, and the folders
    next to either. Codes and stores count if SAE or model, images, site and tokens match.
    """
    index = run.index
    if index is None or not has_heatmaps(index.tokens, index.site):
        return None
    about = index.manifest["model"]
    blank = Image.new("RGB", (8, 8))
    if not about.get("patch_grid") or seen_picture(blank, about.get("preprocessing") or {}) is None:
        return None
    for folder in _places(run):
        try:
            found = _opened(folder, index, run.sae)
        except (SparsightError, OSError):  # unfinished or damaged: the model runs instead
            continue
        if found is not None:
            return found
    return None


def needs_model(run: RunFiles, stored: StoredCodes | None) -> bool:
    """Return whether heatmaps of a run's latents need the model."""
    index = run.index
    return index is not None and stored is None and has_heatmaps(index.tokens, index.site)


def stored_heatmaps(
    stored: StoredCodes, wanted: Mapping[int, Sequence[int]], patch_grid: tuple[int, int]
) -> dict[tuple[int, int], Heat]:
    """Read activations at the patches, by image and latent.

    Args:
        stored: where to read.
        wanted: latents, by image.
        patch_grid: rows and columns of patches.
    """
    rows, columns = patch_grid
    grids: dict[tuple[int, int], Heat] = {}
    for image, values in stored.values(wanted):
        for latent, column in zip(wanted[image], values[-rows * columns :].cpu().T, strict=True):
            grids[image, latent] = column.reshape(rows, columns)
    return grids


def _places(run: RunFiles) -> Iterator[Path]:
    yield run.folder / CODES
    try:
        store = tomllib.loads(run.config).get("store")
    except tomllib.TOMLDecodeError:
        store = None
    if isinstance(store, str):
        yield Path(store)
        yield from _beside(Path(store))
    yield from _beside(run.folder)


def _beside(path: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(each.parent for each in path.absolute().parent.glob(f"*/{MANIFEST}"))
    return []


def _opened(folder: Path, index: LatentIndex, sae: SparseAutoencoder) -> StoredCodes | None:
    about = index.manifest
    if not (folder / MANIFEST).is_file() or not _same_images(read_json(folder / MANIFEST), about):
        return None
    if (folder / "shard-00000.safetensors").is_file():
        codes = CodeStore(folder)
        same = codes.manifest.sae["hash"] == about["sae"]["hash"] and (
            codes.site,
            codes.tokens,
        ) == (index.site, index.tokens)
        return _Codes(codes) if same else None
    store = ActivationStore(folder)
    known = store.model_info.get("weights_hash")
    if known != about["model"].get("weights_hash") or index.site not in store.sites:
        return None
    return _Activations(store.with_tokens(index.tokens), index.site, sae)


def _same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    images = one.get("images")
    known = images.get("fingerprint") if isinstance(images, Mapping) else None
    return bool(known == other["images"]["fingerprint"])


class _Codes:
    def __init__(self, codes: CodeStore) -> None:
        self.codes = codes

    def values(
        self, wanted: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens latents"]]]:
        for image, latents in wanted.items():
            yield image, latent_values(self.codes.image(image), latents)

    def code(self, image: int) -> SparseCode:
        return self.codes.image(image)


class _Activations:
    def __init__(self, store: ActivationStore, site: str, sae: SparseAutoencoder) -> None:
        self.store, self.site, self.sae = store, site, sae

    @torch.no_grad()
    def values(
        self, wanted: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens latents"]]]:
        for batch in self.store.select(list(wanted)).ordered([self.site], BATCH):
            x = batch.activations[self.site].to(self.sae.W_enc.device)
            images = batch.image_indices.tolist()
            latents = sorted({latent for image in images for latent in wanted[image]})
            column = {latent: place for place, latent in enumerate(latents)}
            values = latent_values(self.sae.encode(x.flatten(0, 1)), latents)
            for image, each in zip(images, values.view(len(x), x.shape[1], -1), strict=True):
                yield image, each[:, [column[latent] for latent in wanted[image]]]

    @torch.no_grad()
    def code(self, image: int) -> SparseCode:
        batch = next(iter(self.store.select([image]).ordered([self.site], 1)))
        x = batch.activations[self.site].to(self.sae.W_enc.device)
        return self.sae.encode(x.flatten(0, 1))
