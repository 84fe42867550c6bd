"""Change a model's latents, neurons and directions while it runs.

`intervene(model, edits)` does so for a model inside a `with` block; `Intervention` is the same
change as a module that maps a site's activations and can be used anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.activations import ActivationSource
from sparsight.devices import choose_device
from sparsight.editing.changes import (
    ChangedLatents,
    ChangedNeurons,
    CodeMemo,
    ProjectedVectors,
    added,
    frozen,
)
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
from sparsight.latents import LatentIndex
from sparsight.latents.belonging import check_belongs
from sparsight.sae import SparseAutoencoder
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

    At each site, the latents of all SAEs are first read from the original vector and their changes
    add up, so that the order of latent edits does not matter; then neurons are changed; then
    directions are projected out, one edit after another, so that nothing that an edit writes
    remains along them. An `intervene` inside another one sees the result of the outer one. The
    edits end with the block.

    A vector that an edit does not change keeps its exact bits. Arithmetic is in float32 or wider.
    Gradients flow to pixels and to the model's weights, also through the codes (the change is a
    function of x); the weights of SAEs get none.

    Args:
        model: the model to change.
        edits: what to do, at one site or several.
        check: check that an SAE was trained on this model's weights and at this site. Without the
            check, any SAE of the right width will do.

    Raises:
        UserError: a site does not exist or lacks these positions, an SAE belongs to another model,
            site or width, or two edits touch the same latent.
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
    """Return the interventions that `intervene` puts at each site; see there.

    Args:
        model: the model that they are for.
        edits: what to do.
        check: as in `intervene`.
        memo: see `Intervention`.

    Returns:
        Interventions by site, on the model's device; `model.edit` and `embed_variants` take them.
    """
    given = [edits] if isinstance(edits, Edit) else list(edits)
    by_site: dict[str, list[Edit]] = {}
    for edit in given:
        by_site.setdefault(check_site(model, edit, check=check), []).append(edit)
    return {
        site: Intervention(
            edits_here,
            n_prefix=model.n_prefix,
            per_image=model.token_count(site, "all") == 1,
            device=model.device,
            memo=memo,
        )
        for site, edits_here in by_site.items()
    }


class Intervention(nn.Module):
    """The edits of one site as a module: activations in, activations out.

    It does not need the model, only the number of positions before the patches. When `torch.export`
    traces it, it uses only plain tensor operations.

    Args:
        edits: edits of one site; their `site` is ignored.
        n_prefix: number of positions before the patches: CLS, then registers.
        per_image: the site has one vector per image, and so no positions to choose from.
        device: where it computes; default: the device of the first SAE.
        memo: shared by interventions that get the same tensors one after another.
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
        latents = [edit for edit in edits if isinstance(edit, LatentEdit)]
        _refuse_twice(latents, per_image)

        def tokens(edit: Edit) -> str:
            return "all" if per_image else str(edit.tokens)

        def where(edit: Edit) -> slice:
            return WHERE[tokens(edit)](n_prefix)

        groups: dict[tuple[int, str], list[LatentEdit]] = {}
        for latent_edit in latents:
            key = (id(latent_edit.sae), tokens(latent_edit))
            groups.setdefault(key, []).append(latent_edit)
        # First all latents, from the same x; then the others one after another.
        self._latents = [
            ChangedLatents(group, where(group[0]), memo or CodeMemo()) for group in groups.values()
        ]
        self._others: list[ChangedNeurons | ProjectedVectors] = [
            *(ChangedNeurons(edit, where(edit)) for edit in edits if isinstance(edit, NeuronEdit)),
            *(
                ProjectedVectors(edit, where(edit))
                for edit in edits
                if isinstance(edit, DirectionAblation)
            ),
        ]
        self.parts = nn.ModuleList([*self._latents, *self._others])
        if device is not None:
            self.to(choose_device(device))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Change activations.

        Args:
            x: `[batch, positions, d_in]`, or `[batch, d_in]` for a site with one position.

        Raises:
            UserError: their width is not that for which an edit is made.
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


def mean_codes(
    sae: SparseAutoencoder,
    source: ActivationSource | LatentIndex,
    *,
    site: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
    batch_images: int = 64,
) -> Float[Tensor, " n_latents"]:
    """Return each latent's mean activation over all vectors, inactive ones included.

    Args:
        sae: the SAE.
        source: its index, which stores the means; or activations to encode.
        site: site of the activations; default: the SAE's.
        max_images: size of a random sample of the images; for activations only.
        seed: seed of the sample.
        batch_images: images at a time; for activations only.

    Raises:
        UserError: the index or the activations do not belong to the SAE.
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
        raise UserError("mean_codes: the activations hold no vectors.")
    return (total / n).float()


def _refuse_twice(edits: Sequence[LatentEdit], per_image: bool) -> None:
    """Refuse two edits of the same latent, whose changes would add up to neither."""
    for i, first in enumerate(edits):
        for second in edits[:i]:
            apart = {first.tokens, second.tokens} == {"cls", "patches"} and not per_image
            if first.sae is not second.sae or apart:
                continue
            both = sorted(set(touched(first).tolist()) & set(touched(second).tolist()))
            if both:
                shown = ", ".join(map(str, both[:5])) + (", …" if len(both) > 5 else "")
                raise UserError(
                    f"Two edits of {first.site} change the same latents of one SAE: {shown}. Put "
                    "each latent into one edit, or nest two `intervene` blocks."
                )


def check_site(model: VisionModel, edit: Edit, *, check: bool) -> str:
    """Return the canonical site of an edit, after checking that the edit fits it."""
    if edit.site is None:
        raise UserError(NO_SITE)
    site = model.canonical_site(edit.site)
    width = model.d_in(site)
    if model.token_count(site, "all") == 1:
        if edit.tokens == "patches":
            raise UserError(
                f"{site} of {model.id} has one position and no patches; leave tokens out."
            )
    else:
        model.token_count(site, edit.tokens or "all")
    if isinstance(edit, LatentEdit | DirectionAblation) and edit.sae is not None:
        check_belongs(edit.sae, model, site, strict=check)
    if isinstance(edit, DirectionAblation) and edit.directions.shape[1] != width:
        raise UserError(
            f"The directions have width {edit.directions.shape[1]}, but {site} of {model.id} has "
            f"{width}."
        )
    if isinstance(edit, NeuronEdit):
        checked_numbers(edit.neurons, width, "neuron", f"{site} of {model.id}")
        edit.action.of(numbers(edit.neurons, width), width)
    return site


WHERE: dict[str, Callable[[int], slice]] = {
    "all": lambda n_prefix: slice(None),
    "cls": lambda n_prefix: slice(0, 1),
    "patches": lambda n_prefix: slice(n_prefix, None),
}
"""Positions by name, given the number of positions before the patches."""
