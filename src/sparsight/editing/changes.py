"""Modules that apply each kind of edit to the vectors of a site."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sparsight.editing.actions import Keep
from sparsight.editing.edits import (
    DirectionAblation,
    LatentEdit,
    NeuronEdit,
    numbers,
    touched,
)
from sparsight.errors import UserError
from sparsight.kernels import backend
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.sae.code import Frame


class Change(NamedTuple):
    """What an edit adds to vectors."""

    delta: Float[Tensor, "batch positions d_in"]
    """The difference, in float32 or wider."""

    changed: Bool[Tensor, "batch positions 1"]
    """The vectors for which it is not 0."""


def added(x: Tensor, changes: Sequence[tuple[slice, Change]]) -> Tensor:
    """Return x with all changes, in its own dtype."""
    delta, changed = changes[0][1]
    if len(changes) > 1 or delta.shape != x.shape:
        delta = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        changed = torch.zeros_like(x[..., :1], dtype=torch.bool)
        for where, change in changes:
            delta[:, where] += change.delta
            changed[:, where] |= change.changed
    wide = torch.promote_types(x.dtype, delta.dtype)
    # Adding 0 would turn -0.0 into 0.0.
    return torch.where(changed, (x.to(wide) + delta.to(wide)).to(x.dtype), x)


class CodeMemo:
    """The codes of the last tensor, shared by several interventions on it.

    Meant for `embed_variants` without gradients: each vector is encoded once for all variants.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1
        self._codes: dict[tuple[int, str], SparseCode] = {}

    def code(self, x: Tensor, key: tuple[int, str], encode: Callable[[], SparseCode]) -> SparseCode:
        """Return the code of (some positions of) a tensor; reuse it while the tensor is unchanged.

        Args:
            x: the tensor, compared by identity.
            key: SAE and positions.
            encode: computes the code.
        """
        if self._x is None or self._x() is not x or self._version != x._version:
            self._x, self._version, self._codes = weakref.ref(x), x._version, {}
        if key not in self._codes:
            self._codes[key] = encode()
        return self._codes[key]


class ChangedLatents(nn.Module):
    """Edits with one SAE at the same positions; its code is computed once."""

    def __init__(self, edits: Sequence[LatentEdit], where: slice, memo: CodeMemo) -> None:
        super().__init__()
        self.where = where
        self._memo, self._key = memo, (id(edits[0].sae), str(where))
        self.sae = frozen(edits[0].sae)
        self.actions = []
        for i, edit in enumerate(edits):
            chosen = touched(edit)
            self.register_buffer(f"chosen_{i}", chosen)
            place = torch.full((edit.sae.n_latents,), -1)
            place[chosen] = torch.arange(len(chosen))
            self.register_buffer(f"place_{i}", place)
            self.actions.append(edit.action)

    def forward(self, x: Float[Tensor, "batch positions d_in"]) -> Change:
        """Return the change of the vectors at the positions `where`."""
        if x.shape[-1] != self.sae.d_in:
            raise UserError(
                f"The SAE takes vectors of width {self.sae.d_in}; those of the site have width "
                f"{x.shape[-1]}."
            )
        here = x[:, self.where]
        vectors = here.flatten(0, 1).to(self.sae.W_dec.dtype)
        if torch.compiler.is_compiling():
            delta, changed = self._dense(vectors)
        elif torch.is_grad_enabled():
            delta, changed = self._sparse(vectors, self.sae.encode(vectors))
        else:
            code = self._memo.code(x, self._key, lambda: self.sae.encode(vectors))
            delta, changed = self._sparse(vectors, code)
        return Change(delta.view(*here.shape[:2], -1), changed.view(*here.shape[:2], 1))

    def _sparse(self, x: Tensor, code: SparseCode) -> tuple[Tensor, Tensor]:
        """Compute the change from the active latents only, if the action keeps zeros."""
        rows, W_dec = code.rows, self.sae.W_dec
        z = torch.zeros_like(x)
        changed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i, action in enumerate(self.actions):
            chosen, place = self._chosen(i)
            hit = place[code.indices] >= 0
            if action.keeps_zero:
                values = code.values[hit]
                part, moved = active_change(self.sae, code, hit, action(values) - values)
                z, changed = z + part, changed | moved
                continue
            columns = place[code.indices[hit]]
            f = x.new_zeros(len(x), len(chosen))
            f = f.index_put((rows[hit], columns), code.values[hit])
            change = action(f) - f
            z = z + change @ W_dec[chosen]
            changed = changed | (change != 0).any(dim=1)
        return z * units(self.sae, code.frame), changed

    def _dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the change with operations whose shapes do not depend on the code."""
        sae = self.sae
        f = sae.config.sparsity.dense(sae.weights(), sae.normaliser(x)).code
        if sae.config.soft_cap is not None:
            f = sae.config.soft_cap * (f / sae.config.soft_cap).tanh()
        z = torch.zeros_like(x)
        changed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i, action in enumerate(self.actions):
            chosen, _ = self._chosen(i)
            change = action(f[:, chosen]) - f[:, chosen]
            z = z + change @ sae.W_dec[chosen]
            changed = changed | (change != 0).any(dim=1)
        return z * units(sae, sae.normaliser.frame(x)), changed

    def _chosen(self, i: int) -> tuple[Int[Tensor, " chosen"], Int[Tensor, " n_latents"]]:
        return getattr(self, f"chosen_{i}"), getattr(self, f"place_{i}")


def active_change(
    sae: SparseAutoencoder,
    code: SparseCode,
    hit: Bool[Tensor, " active"],
    change: Float[Tensor, " hit"],
) -> tuple[Float[Tensor, "rows d_in"], Bool[Tensor, " rows"]]:
    """Return the effect of changed activations on vectors, in normalised space, and on which.

    Args:
        sae: the SAE.
        code: the code of the vectors.
        hit: the entries of the code that change.
        change: the change of each of these entries.
    """
    starts = functional.pad(hit.cumsum(0), (1, 0))[code.offsets]
    no_bias = sae.W_dec.new_zeros(sae.W_dec.shape[1])
    z = backend().decode(change, code.indices[hit], starts, sae.W_dec, no_bias)
    changed = torch.zeros(len(code), dtype=torch.bool, device=z.device)
    moved = code.rows[hit][change != 0]
    return z, changed.index_put((moved,), changed.new_ones(()))


def units(sae: SparseAutoencoder, frame: Frame | None) -> Tensor:
    """Return the factor from differences in normalised space to those in the model's units."""
    scale: Tensor = sae.normaliser.scale if frame is None else frame.scale
    return scale


class ChangedNeurons(nn.Module):
    """An edit of a site's coordinates."""

    chosen: Tensor | None

    def __init__(self, edit: NeuronEdit, where: slice) -> None:
        super().__init__()
        self.where = where
        self.edit = edit
        chosen = None if edit.neurons is None else torch.tensor(edit.neurons, dtype=torch.int64)
        self.register_buffer("chosen", chosen)

    def forward(
        self, x: Float[Tensor, "batch positions d_in"]
    ) -> Float[Tensor, "batch positions d_in"]:
        """Return the vectors with the chosen coordinates replaced."""
        n = x.shape[-1]
        if self.edit.neurons and max(self.edit.neurons) >= n:
            raise UserError(
                f"{self.edit.site} has no neuron {max(self.edit.neurons)}; it has 0 to {n - 1}."
            )
        action = self.edit.action.of(numbers(self.edit.neurons, n), n)
        chosen = torch.arange(n, device=x.device) if self.chosen is None else self.chosen
        if isinstance(action, Keep):
            dropped = torch.ones(n, dtype=torch.bool, device=x.device)
            dropped[chosen] = False
            return torch.where(dropped & (x != 0), 0, x)
        old = x[..., chosen]
        new = action(old.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        return x.index_copy(-1, chosen, torch.where(new == old, old, new))


class ProjectedVectors(nn.Module):
    """An edit that projects directions out."""

    basis: Tensor
    left: Tensor

    def __init__(self, edit: DirectionAblation, where: slice) -> None:
        super().__init__()
        self.where = where
        basis = edit.basis()
        mean = basis.new_zeros(basis.shape[1]) if edit.mean is None else edit.mean.double()
        self.register_buffer("basis", basis)
        self.register_buffer("left", basis @ mean.to(basis.device))

    def forward(
        self, x: Float[Tensor, "batch positions d_in"]
    ) -> Float[Tensor, "batch positions d_in"]:
        """Return the vectors with only `left` along the directions."""
        if x.shape[-1] != self.basis.shape[1]:
            raise UserError(
                f"The directions have width {self.basis.shape[1]}; the site's vectors have "
                f"{x.shape[-1]}."
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        basis = self.basis.to(wide.dtype)
        along = wide @ basis.T - self.left.to(wide.dtype)
        changed = (along != 0).any(dim=-1, keepdim=True)
        return torch.where(changed, (wide - along @ basis).to(x.dtype), x)


def frozen(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Return a view of the SAE in `eval` mode, without gradients; the tensors are shared."""
    view = copy.copy(sae)
    view._parameters = {
        name: None if each is None else nn.Parameter(each.detach(), requires_grad=False)
        for name, each in sae._parameters.items()
    }
    view._buffers = dict(sae._buffers)
    view._modules = {name: copy.deepcopy(each) for name, each in sae._modules.items()}
    view.training = False
    return view.to(torch.promote_types(sae.W_dec.dtype, torch.float32))
