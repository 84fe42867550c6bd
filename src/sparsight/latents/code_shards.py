"""Codes on their way to disk: batches that become the next shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sparsight.activations.shards import check_sum, map_tensors, write_tensors
from sparsight.errors import SparsightError
from sparsight.latents.code_manifest import AGAIN, DTYPES, CodeManifest, CodeShard, shard_path
from sparsight.sae import SparseCode

SMALLEST_FLOAT16 = 2.0**-24


@dataclass(frozen=True)
class CodeBatch:
    """Codes of consecutive images.

    Attributes:
        image_indices: places of the images in their source.
        code: `len(image_indices) × n_tokens` rows, grouped by image; float32.
        n_tokens: rows per image.
    """

    image_indices: Int[Tensor, " batch"]
    code: SparseCode
    n_tokens: int

    @classmethod
    def joined(cls, batches: Sequence[CodeBatch]) -> CodeBatch:
        """Join consecutive batches into one."""
        codes = [batch.code for batch in batches]
        l0 = torch.cat([code.l0 for code in codes])
        code = SparseCode(
            torch.cat([code.indices for code in codes]),
            torch.cat([code.values for code in codes]),
            torch.cat([l0.new_zeros(1), l0.cumsum(0)]),
            codes[0].n_latents,
        )
        images = torch.cat([batch.image_indices for batch in batches])
        return cls(images, code, batches[0].n_tokens)


class ShardBuffer:
    """Batches of codes that become the next shard, in the file's types.

    Args:
        manifest: manifest of the codes.

    Attributes:
        n_bytes: approximate size on disk.
        n_images: number of images in the buffer.
    """

    def __init__(self, manifest: CodeManifest) -> None:
        self.n_bytes = 0
        self.n_images = 0
        self._dtypes = {"values": DTYPES[manifest.dtype], "indices": manifest.index_dtype}
        self._n_latents = manifest.n_latents
        self._parts: list[dict[str, Tensor]] = []  # only whole batches, wherever a run stops

    def add(self, batch: CodeBatch) -> None:
        """Append a batch.

        Raises:
            SparsightError: an activation is out of range for the type on disk.
        """
        code = batch.code
        indices, values = code.indices.cpu(), code.values.cpu().to(self._dtypes["values"])
        if values.dtype == torch.float16:
            if not bool(values.isfinite().all()):
                images = batch.image_indices
                strongest = float(code.values[code.values.abs().argmax()])
                raise SparsightError(
                    f"Activations up to {strongest:.3g} do not fit float16, whose range is ±65504 "
                    f"(images {int(images[0])} to {int(images[-1])}). Encode with dtype float32."
                )
            # Active latents stay active, with their signs.
            least = torch.full_like(values, SMALLEST_FLOAT16).copysign(values)
            values = torch.where(values == 0, least, values)
        new = {
            "image_indices": batch.image_indices.cpu().long(),
            "l0": code.l0.cpu(),
            "values": values,
            "indices": indices.to(self._dtypes["indices"]),
        }
        self._append(new)

    def restore(self, folder: Path, manifest: CodeManifest) -> None:
        """Load what a stopped encoding left of the last shard.

        Raises:
            SparsightError: the shard is damaged.
        """
        number, shard = len(manifest.whole_shards), manifest.shards[-1]
        path = shard_path(folder, number, shard)
        stored = map_tensors(path, manifest.layout(shard), shard.n_bytes, AGAIN)
        check_sum(path, shard.sha256, AGAIN)
        part = {name: stored[name].clone() for name in ("image_indices", "values", "indices")}
        self._append({**part, "l0": stored["offsets"].diff()})

    def write(
        self, folder: Path, manifest: CodeManifest, *, unfinished: bool = False
    ) -> CodeManifest:
        """Write the next shard, then the manifest that names it.

        Args:
            folder: folder of the codes.
            manifest: manifest of what is there.
            unfinished: whether the shard is not full, so that this encoding or the next adds to it.

        Returns:
            The manifest including the shard.

        Raises:
            SparsightError: the disk is full.
        """
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        tensors["n_active"] = torch.zeros(self._n_latents, dtype=torch.int64)
        for part in self._parts:
            found = torch.bincount(part["indices"].long(), minlength=self._n_latents)
            tensors["n_active"] += found
        counts = tensors.pop("l0").long()
        tensors["offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        images = tensors["image_indices"]
        n_active = len(tensors["values"])
        shard = CodeShard(len(images), int(images[-1]), n_active, "", 0, unfinished)
        path = shard_path(folder, len(manifest.whole_shards), shard)
        sha256 = write_tensors(path, {name: tensors[name] for name in manifest.layout(shard)})
        shard = dataclasses.replace(shard, sha256=sha256, n_bytes=path.stat().st_size)
        grown = dataclasses.replace(manifest, shards=(*manifest.whole_shards, shard))
        grown.write(folder)
        if manifest.shards and manifest.shards[-1].unfinished:
            old = shard_path(folder, len(manifest.whole_shards), manifest.shards[-1])
            if old != path:
                old.unlink(missing_ok=True)
        return grown

    def _append(self, new: dict[str, Tensor]) -> None:
        self._parts.append(new)
        self.n_bytes += sum(part.numel() * part.element_size() for part in new.values())
        self.n_images += len(new["image_indices"])
