"""In how many images of each label a latent fires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int32, Int64

from sparsight.activations.shards import map_tensors, write_tensors
from sparsight.latents.examples import LatentEntries

KEYS = ("offsets", "label", "count")


@dataclass
class LabelCounts:
    """Counts in compressed rows: latents × labels.

    Attributes:
        names: the labels, sorted.
        totals: number of images of each label.
        offsets: latent `i` has the entries `offsets[i]` to `offsets[i + 1]`.
        label: place in `names` of each entry; rising within a latent.
        count: images of this label in which the latent fires.
    """

    names: list[str]
    totals: Int64[np.ndarray, " labels"]
    offsets: Int64[np.ndarray, " latents_and_one"]
    label: Int32[np.ndarray, " entries"]
    count: Int32[np.ndarray, " entries"]

    def of(self, latent: int) -> dict[str, int]:
        """Return the counts of one latent, the largest first; among equals, by label."""
        here = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
        labels, counts = self.label[here].tolist(), self.count[here].tolist()
        ordered = sorted(zip(labels, counts, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return {self.names[label]: count for label, count in ordered}

    @classmethod
    def open(
        cls, path: Path, labels: pa.Table, n_latents: int, n_entries: int, again: str
    ) -> LabelCounts:
        """Memory-map the counts.

        Args:
            path: file of the counts.
            labels: table of labels with `label` and `n_images`.
            n_latents: number of latents.
            n_entries: number of entries.
            again: what to do if the file is damaged, as a sentence.

        Raises:
            SparsightError: the file is missing, cut off, or has another layout.
        """
        lengths = (n_latents + 1, n_entries, n_entries)
        kinds = (torch.int64, torch.int32, torch.int32)
        layout = {key: ((n,), kind) for key, n, kind in zip(KEYS, lengths, kinds, strict=True)}
        mapped = map_tensors(path, layout, path.stat().st_size, again)
        totals = labels["n_images"].to_numpy()
        return cls(labels["label"].to_pylist(), totals, *(mapped[key].numpy() for key in KEYS))


@dataclass
class LabelCounter:
    """Counts labels block by block of latents.

    Args:
        labels: label of each image that was read, or None.
        places: place of each of these images in the source.
        n_places: number of images in the source.
        n_latents: number of latents.
    """

    labels: Sequence[str | None]
    places: Int64[np.ndarray, " images"]
    n_places: int
    n_latents: int
    names: list[str] = field(init=False)
    totals: Int64[np.ndarray, " labels"] = field(init=False)

    def __post_init__(self) -> None:
        self.names = sorted({label for label in self.labels if label is not None})
        number = {name: i for i, name in enumerate(self.names)}
        self._of_place = torch.full((self.n_places,), -1, dtype=torch.int64)
        numbers = [-1 if label is None else number[label] for label in self.labels]
        self._of_place[torch.from_numpy(self.places.copy())] = torch.tensor(
            numbers, dtype=torch.int64
        )
        known = self._of_place[self._of_place >= 0]
        self.totals = known.bincount(minlength=len(self.names)).numpy()
        self._lengths = torch.zeros(self.n_latents, dtype=torch.int64)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, entries: LatentEntries) -> None:
        """Count the labels of a block of latents; blocks come in order."""
        label = self._of_place[entries.image]
        latent, label = entries.latent[label >= 0], label[label >= 0]
        n_labels = max(1, len(self.names))
        pairs, counts = (latent * n_labels + label).unique(return_counts=True)
        self._lengths += (pairs // n_labels).bincount(minlength=self.n_latents)
        self._parts.append(((pairs % n_labels).to(torch.int32), counts.to(torch.int32)))

    def write(self, path: Path) -> int:
        """Write the counts.

        Returns:
            The number of entries.
        """
        label, count = (
            (
                torch.cat([torch.zeros(0, dtype=torch.int32), *column])
                for column in zip(*self._parts, strict=True)
            )
            if self._parts
            else (torch.zeros(0, dtype=torch.int32),) * 2
        )
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self._lengths.cumsum(0)])
        write_tensors(path, dict(zip(KEYS, (offsets, label, count), strict=True)))
        return len(label)

    @property
    def table(self) -> pa.Table:
        """One row per label: `label`, `n_images`."""
        return pa.table(
            {"label": pa.array(self.names, pa.string()), "n_images": pa.array(self.totals)}
        )
