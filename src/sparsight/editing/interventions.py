"""Change what a model's latents, neurons and directions say, while it runs.

`intervene(model, edits)` does it to a model inside a `with`; `Intervention` is the same change as a
module that maps a site's activations, to be used anywhere.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sparsight.activations import ActivationSource
from sparsight.devices import choose_device
from sparsight.editing.actions import Keep
from sparsight.editing.edits import (
    NO_SITE,
    DirectionAblation,
    Edit,
    LatentEdit,
    NeuronEdit,
    checked_numbers,
    numbers,
    touched,
)
from sparsight.errors import UserError
from sparsight.evaluation.data import Passes, find_site
from sparsight.kernels import backend
from sparsight.latents import LatentIndex
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.sae.code import Frame
from sparsight.vision import VisionModel

__all__ = [
    "DirectionAblation",
    "Edit",
    "Intervention",
    "LatentEdit",
    "NeuronEdit",
    "check_belongs",
    "intervene",
    "interventions",
    "mean_codes",
]


@contextmanager
def intervene(
    model: VisionModel, edits: Sequence[Edit] | Edit, *, check: bool = True
) -> Iterator[None]:
    """Change activations in every forward pass inside the `with` block.

    At one site the latents of all SAEs are read from the vector as it came, and their changes add
    up, so that the order of latent edits does not matter; then neurons are changed; then directions
    are projected out, one edit after another, so that nothing that an edit writes is left along
    them. An `intervene` inside another one sees what the outer one made. The edits end with the
    block.

    A vector that an edit does not change keeps its very bits. Arithmetic is float32 at least.
    Gradients flow to pixels and to the model's weights, through the codes as well (the change is a
    function of x); the weights of SAEs get none.

    Args:
        model: whose forward passes.
        edits: what to do, at one site or several.
        check: make sure that an SAE was trained on this model's weights, at this site. Off, any SAE
            of the right width will do.

    Raises:
        UserError: a site does not exist or has no such positions, an SAE is of another model, site
            or width, or two edits touch the same latent.
    """
    with model.edit(interventions(model, edits, check=check)):
        yield


def interventions(
    model: VisionModel,
    edits: Sequence[Edit] | Edit,
    *,
    check: bool = True,
    memo: CodeMemo | None = None,
) -> dict[str, Intervention]:
    """What `intervene` puts at each site; see there.

    Args:
        model: whose sites.
        edits: what to do.
        check: as in `intervene`.
        memo: see `Intervention`.

    Returns:
        By site, on the model's device; `model.edit` and `embed_variants` take them.
    """
    given = [edits] if isinstance(edits, Edit) else list(edits)
    by_site: dict[str, list[Edit]] = {}
    for edit in given:
        by_site.setdefault(check_site(model, edit, check=check), []).append(edit)
    return {
        site: Intervention(
            some,
            n_prefix=model.n_prefix,
            per_image=model.token_count(site, "all") == 1,
            device=model.device,
            memo=memo,
        )
        for site, some in by_site.items()
    }


class CodeMemo:
    """The codes of the tensor that was seen last, for interventions that differ in what they do.

    Meant for `embed_variants` without gradients: each vector is encoded once for all variants.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1
        self._codes: dict[tuple[int, str], SparseCode] = {}

    def code(self, x: Tensor, key: tuple[int, str], encode: Callable[[], SparseCode]) -> SparseCode:
        """The code of (some positions of) this very tensor, unchanged since.

        Args:
            x: the tensor, by identity.
            key: SAE and positions.
            encode: makes it.
        """
        if self._x is None or self._x() is not x or self._version != x._version:
            self._x, self._version, self._codes = weakref.ref(x), x._version, {}
        if key not in self._codes:
            self._codes[key] = encode()
        return self._codes[key]


class Intervention(nn.Module):
    """The change of some edits of one site, as a module: activations in, activations out.

    It needs no model: only to know how many positions stand before the patches. It is made of
    plain tensor operations when `torch.export` traces it.

    Args:
        edits: all of one site, whatever their `site` says.
        n_prefix: positions before the patches: CLS, then registers.
        per_image: the site has one vector a picture, and so no positions to choose from.
        device: where it computes; default that of the first SAE.
        memo: shared by interventions that get the same tensors, one after another.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        *,
        n_prefix: int = 1,
        per_image: bool = False,
        device: torch.device | str | None = None,
        memo: CodeMemo | None = None,
    ) -> None:
        super().__init__()
        latents = [each for each in edits if isinstance(each, LatentEdit)]
        _refuse_twice(latents, per_image)

        def tokens(edit: Edit) -> str:
            return "all" if per_image else str(edit.tokens)

        def where(edit: Edit) -> slice:
            return WHERE[tokens(edit)](n_prefix)

        groups: dict[tuple[int, str], list[LatentEdit]] = {}
        for each in latents:
            groups.setdefault((id(each.sae), tokens(each)), []).append(each)
        # All latents first, from one x; then the others one after another.
        self._latents = [
            _Latents(group, where(group[0]), memo or CodeMemo()) for group in groups.values()
        ]
        self._others: list[_Neurons | _Projection] = [
            *(_Neurons(each, where(each)) for each in edits if isinstance(each, NeuronEdit)),
            *(
                _Projection(each, where(each))
                for each in edits
                if isinstance(each, DirectionAblation)
            ),
        ]
        self.parts = nn.ModuleList([*self._latents, *self._others])
        if device is not None:
            self.to(choose_device(device))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Change activations.

        Args:
            x: `[batch, positions, d_in]`, or `[batch, d_in]` of a site with one position.

        Raises:
            UserError: they have another width than an edit is made for.
        """
        if x.ndim == 2:
            flat: Tensor = self(x[:, None])
            return flat[:, 0]
        if self._latents:
            x = added(x, [(part.where, part(x)) for part in self._latents])
        for part in self._others:
            here: Tensor = part(x[:, part.where])
            if here.shape == x.shape:
                x = here
            else:
                x = x.clone()
                x[:, part.where] = here
        return x


class Change(NamedTuple):
    """What is to be added to some vectors."""

    delta: Float[Tensor, "batch positions d_in"]
    """In float32 at least."""

    changed: Bool[Tensor, "batch positions 1"]
    """The vectors for which it is not 0."""


def added(x: Tensor, changes: Sequence[tuple[slice, Change]]) -> Tensor:
    """x with all changes, in its own dtype."""
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


class _Latents(nn.Module):
    """Edits of one SAE at the same positions; its code is computed once."""

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
        """The change of the vectors at its positions, `where`."""
        if x.shape[-1] != self.sae.d_in:
            raise UserError(
                f"The SAE takes vectors of width {self.sae.d_in}; the site's have {x.shape[-1]}."
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
        """Touches the active latents alone, where the action leaves the others alone."""
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
        """The same in operations whose shapes do not depend on the code."""
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
    """What changes of some active latents do to vectors, in normalised space; and to which.

    Args:
        sae: the SAE.
        code: of the vectors.
        hit: the entries of the code that change.
        change: of each of them.
    """
    starts = functional.pad(hit.cumsum(0), (1, 0))[code.offsets]
    no_bias = sae.W_dec.new_zeros(sae.W_dec.shape[1])
    z = backend().decode(change, code.indices[hit], starts, sae.W_dec, no_bias)
    changed = torch.zeros(len(code), dtype=torch.bool, device=z.device)
    moved = code.rows[hit][change != 0]
    return z, changed.index_put((moved,), changed.new_ones(()))


def units(sae: SparseAutoencoder, frame: Frame | None) -> Tensor:
    """What a difference in normalised space is multiplied by to be one in the model's units."""
    scale: Tensor = sae.normaliser.scale if frame is None else frame.scale
    return scale


class _Neurons(nn.Module):
    """An edit of coordinates."""

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
        """The vectors with what is chosen replaced."""
        n = x.shape[-1]
        if self.edit.neurons and max(self.edit.neurons) >= n:
            raise UserError(
                f"{self.edit.site} has neurons 0 to {n - 1}; there is no {max(self.edit.neurons)}."
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


class _Projection(nn.Module):
    """Directions that are projected out."""

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
        """The vectors with `left` alone along the directions."""
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


def mean_codes(
    sae: SparseAutoencoder,
    source: ActivationSource | LatentIndex,
    *,
    site: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
    batch_images: int = 64,
) -> Float[Tensor, " n_latents"]:
    """The mean activation of each latent over all vectors, those it is not active on included.

    Args:
        sae: the SAE.
        source: its index, which has them; or activations to encode.
        site: of the activations; default the SAE's.
        max_images: a random sample of so many; activations alone.
        seed: of the sample.
        batch_images: images at a time; activations alone.

    Raises:
        UserError: index or activations do not belong to the SAE.
    """
    if isinstance(source, LatentIndex):
        source.check_sae(sae)
        table = source.table
        density = torch.tensor(table["density"].to_pylist(), dtype=torch.float64)
        means = [value or 0.0 for value in table["mean_activation"].to_pylist()]
        return (density * torch.tensor(means, dtype=torch.float64)).float()
    view = frozen(sae)
    total = torch.zeros(sae.n_latents, dtype=torch.float64, device=view.W_dec.device)
    n = 0
    passes = Passes(
        source,
        find_site(sae, source, site),
        max_images=max_images,
        seed=seed,
        batch_images=batch_images,
        device=view.W_dec.device,
        cache_bytes=0,
    )
    with torch.no_grad():
        for batch in passes:
            code = view.encode(batch.x.flatten(0, 1).to(view.W_dec.dtype))
            total.index_add_(0, code.indices, code.values.double())
            n += len(code)
    if not n:
        raise UserError("mean_codes: the activations hold no vector.")
    return (total / n).float()


def frozen(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE in use (`eval`), its weights without gradients; the tensors are shared."""
    view = copy.copy(sae)
    view._parameters = {
        name: None if each is None else nn.Parameter(each.detach(), requires_grad=False)
        for name, each in sae._parameters.items()
    }
    view._buffers = dict(sae._buffers)
    view._modules = {name: copy.deepcopy(each) for name, each in sae._modules.items()}
    view.training = False
    return view.to(torch.promote_types(sae.W_dec.dtype, torch.float32))


def _refuse_twice(edits: Sequence[LatentEdit], per_image: bool) -> None:
    """Two changes of one latent would add up to neither."""
    for i, first in enumerate(edits):
        for second in edits[:i]:
            apart = {first.tokens, second.tokens} == {"cls", "patches"} and not per_image
            if first.sae is not second.sae or apart:
                continue
            both = sorted(set(touched(first).tolist()) & set(touched(second).tolist()))
            if both:
                shown = ", ".join(map(str, both[:5])) + (", …" if len(both) > 5 else "")
                raise UserError(
                    f"Latents {shown} of one SAE are in two edits of {first.site}. Put each into "
                    "one, or nest two `intervene`."
                )


def check_site(model: VisionModel, edit: Edit, *, check: bool) -> str:
    """The canonical site of an edit, after making sure that it can be had there."""
    if edit.site is None:
        raise UserError(NO_SITE)
    site = model.canonical_site(edit.site)
    width = model.d_in(site)
    if model.token_count(site, "all") == 1:
        if edit.tokens == "patches":
            raise UserError(
                f"{site} of {model.id} has one position, and no patches; leave tokens out."
            )
    else:
        model.token_count(site, edit.tokens or "all")
    if isinstance(edit, LatentEdit | DirectionAblation) and edit.sae is not None:
        check_belongs(edit.sae, model, site, strict=check)
    if isinstance(edit, DirectionAblation) and edit.directions.shape[1] != width:
        raise UserError(
            f"The directions have width {edit.directions.shape[1]}, {site} of {model.id} has "
            f"{width}."
        )
    if isinstance(edit, NeuronEdit):
        checked_numbers(edit.neurons, width, "neuron", f"{site} of {model.id}")
        edit.action.of(numbers(edit.neurons, width), width)
    return site


def check_belongs(
    sae: SparseAutoencoder, model: VisionModel, site: str, *, strict: bool = True
) -> None:
    """Make sure that an SAE's codes mean something at a site of a model.

    Args:
        sae: what it was trained on stands in its metadata; what that does not say is not compared.
        model: the model.
        site: canonical.
        strict: compare weights and site, not the width alone.

    Raises:
        UserError: it was trained on other weights, at another site, or for another width.
    """
    about: Mapping[str, object] = sae.metadata.get("model") or {}
    named = about.get("id") or "a model that it does not name"
    if sae.d_in != model.d_in(site):
        raise UserError(
            f"The SAE takes vectors of width {sae.d_in} (it was trained on {named}, "
            f"{sae.metadata.get('site') or 'site unknown'}); {site} of {model.id} has "
            f"{model.d_in(site)}."
        )
    if not strict:
        return
    trained = about.get("weights_hash")
    if trained is not None and trained != model.weights_hash:
        raise UserError(
            f"The SAE was trained on {named} (weights {str(trained)[:8]}), this model is "
            f"{model.id} (weights {model.weights_hash[:8]}): its latents mean other things there. "
            "Pass check=False (--no-check) to take it all the same."
        )
    own = sae.metadata.get("site")
    if own is not None and model.canonical_site(str(own)) != site:
        raise UserError(
            f"The SAE was trained at {own} of {named}, the edit is at {site}. Pass check=False "
            "(--no-check) to take it all the same."
        )


WHERE: dict[str, Callable[[int], slice]] = {
    "all": lambda n_prefix: slice(None),
    "cls": lambda n_prefix: slice(0, 1),
    "patches": lambda n_prefix: slice(n_prefix, None),
}
"""Positions by name, from how many stand before the patches."""
