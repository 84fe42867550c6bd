"""Accuracy with only, or without, the strongest latents of each class: on-k and off-k curves."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparsight.editing.bench import Bench
from sparsight.editing.changes import Change, CodeMemo, active_change, added, frozen, units
from sparsight.editing.class_codes import ClassCodes, matched_latents
from sparsight.editing.edits import Positions
from sparsight.editing.interventions import WHERE
from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import PassSettings


def checked_ks(ks: Sequence[int] | None, n_latents: int) -> list[int]:
    """Return the given ks in ascending order, or the default ones.

    Raises:
        UserError: a k is below 1 or above the number of latents.
    """
    asked = sorted(set(ks)) if ks is not None else default_ks(n_latents)
    if not asked or asked[0] < 1 or asked[-1] > n_latents:
        raise UserError(f"ks are {asked}; give numbers from 1 to {n_latents}.")
    return asked


def default_ks(n_latents: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, … up to all latents."""
    steps = [m * 10**e for e in range(int(math.log10(n_latents)) + 1) for m in (1, 2, 5)]
    return [k for k in steps if k < n_latents] + [n_latents]


def class_curves(
    bench: Bench,
    sae: SparseAutoencoder,
    site: str,
    tokens: Positions,
    found: ClassCodes,
    ks: Sequence[int],
    seed: int,
    settings: PassSettings,
) -> list[dict[str, Any]]:
    """Measure on-k and off-k with the latents of the classes, and with random ones."""
    n = sae.n_latents
    by_class = torch.zeros(len(bench.classes), n, dtype=torch.int64)
    by_class[[bench.classes.index(label) for label in found.classes]] = found.strongest()
    orders = {"class": by_class, "random": matched_latents(found.density, seed)[by_class]}
    device = bench.model.device
    ranks = {name: order.argsort(dim=1).to(device) for name, order in orders.items()}
    where = slice(None)
    if bench.model.token_count(site, "all") > 1:
        where = WHERE[tokens](bench.model.n_prefix)
    edits = _ByClass(frozen(sae).to(device), where, ranks)
    variants = {
        f"{kind} {chosen} {k}": edits.edit(kind, chosen, k)
        for kind in ("on", "off")
        for chosen in orders
        for k in ks
    }
    tallies = bench.run(variants, "curves", begin=edits.begin, captions=False, settings=settings)
    keys = ("top1", "interval", "difference", "difference_interval", "mean_of_classes", "n")
    rows = []
    for name, tally in tallies.items():
        figures = tally.result()
        kind, chosen, k = (*name.split(), "", "")[:3]
        row: dict[str, Any] = {"kind": kind, "latents": chosen or None, "k": int(k) if k else None}
        rows.append(row | {key: figures[key] for key in keys})
    return rows


class _ByClass:
    """Edits that keep or drop latents according to the class of each image.

    Args:
        sae: the SAE.
        where: positions that are changed.
        ranks: for each way to choose, the rank of every latent in the order of each class.
    """

    def __init__(
        self, sae: SparseAutoencoder, where: slice, ranks: Mapping[str, Int[Tensor, "classes n"]]
    ) -> None:
        self.sae, self.where, self.ranks = sae, where, ranks
        self._memo = CodeMemo()
        self._classes: Tensor = torch.zeros(0, dtype=torch.int64)
        self._seen: weakref.ref[Tensor] | None = None
        self._next, self._here = 0, slice(0, 0)

    def begin(self, classes: Int[Tensor, " batch"]) -> None:
        """Announce the classes of the images that come next, in order."""
        self._classes, self._seen, self._next = classes, None, 0

    def edit(self, kind: str, chosen: str, k: int) -> Callable[[Tensor], Tensor]:
        """Return the edit for one point of a curve."""

        def apply(x: Tensor) -> Tensor:
            classes = self._of(x)
            part = x[:, self.where]
            vectors = part.flatten(0, 1).to(self.sae.W_dec.dtype)
            code = self._memo.code(x, (0, ""), lambda: self.sae.encode(vectors))
            rank = self.ranks[chosen][classes[code.rows // part.shape[1]], code.indices]
            hit = rank >= k if kind == "on" else rank < k
            z, changed = active_change(self.sae, code, hit, -code.values[hit])
            delta = (z * units(self.sae, code.frame)).view(part.shape)
            return added(x, [(self.where, Change(delta, changed.view(*part.shape[:2], 1)))])

        return apply

    def _of(self, x: Tensor) -> Tensor:
        """Return the classes of the images in x: the next in the batch, or from its start again."""
        if self._seen is None or self._seen() is not x:
            self._seen = weakref.ref(x)
            start = self._next if self._next < len(self._classes) else 0
            self._here, self._next = slice(start, start + len(x)), start + len(x)
        return self._classes[self._here].to(x.device)
