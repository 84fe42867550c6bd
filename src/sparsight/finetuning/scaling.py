"""Scaling of text-salient neurons while training on the attack set.

zer0int's idea: amplify the neurons that writing excites on attacked images, so that the loss has
more to say about them. In his script the hooks are added after the forward pass and removed before
the next, mistake rows of the batch for neurons, and all act on the last block; here tests cover
each of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsight.config import check_types
from sparsight.errors import SparsightError, UserError
from sparsight.vision import VisionModel


@dataclass(frozen=True)
class NeuronScaling:
    """Which neurons of the vision tower's MLPs are scaled, by how much and how long."""

    factor: float = 1.0
    """Factor by which the neurons' values before the activation function are multiplied, on
    attacked images; 1 has no effect. zer0int's script uses 100."""

    blocks: tuple[int, ...] = ()
    """Blocks in which to scale neurons; negative numbers count from the end. Empty means the later
    half of the blocks."""

    top: int = 8
    """Number of neurons to scale per block if none are named: those with the largest mean over the
    positions of the batch's attacked images."""

    until: float = 0.4
    """Share of the run after which scaling ends."""

    warmup: float = 0.0
    """Share of the run in which the factor rises from 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.factor < 0:
            raise UserError(f"scaling.factor is {self.factor}; it must be 0 or more.")
        if self.top < 1:
            raise UserError(f"scaling.top is {self.top}; it must be 1 or more.")
        for name in ("until", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"scaling.{name} is {getattr(self, name)}; it must be a share from 0 to 1."
                )

    def factor_at(self, step: int, n_steps: int) -> float:
        """Return the factor of a step; exactly 1 if nothing is scaled."""
        if step >= self.until * n_steps:
            return 1.0
        rise = self.warmup * n_steps
        return 1 + (self.factor - 1) * (min(1.0, (step + 1) / rise) if rise >= 1 else 1.0)


class ScaledNeurons:
    """Scales neurons inside a `with` block that holds the forward pass.

    Args:
        model: the model with the neurons.
        settings: which blocks, and how many neurons.
        neurons: the neurons, by block; default: chosen for each batch.

    Attributes:
        chosen: by block, the neurons that the last forward pass scaled.

    Raises:
        UserError: the model has no such block or neuron, or does not expose its neurons.
    """

    def __init__(
        self,
        model: VisionModel,
        settings: NeuronScaling,
        neurons: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.chosen: dict[int, Int[Tensor, " top"]] = {}
        if neurons is not None:
            neurons = {i % model.n_blocks if i < 0 else i: each for i, each in neurons.items()}
            if not neurons or not all(neurons.values()):
                raise UserError(
                    "scaling: a block, or every block, has no neurons to scale; leave it out."
                )
        blocks = neurons or settings.blocks or range(model.n_blocks // 2, model.n_blocks)
        # -1 and the last block's number are one site.
        places = [model.canonical_site(f"blocks.{i}.mlp_pre") for i in blocks]
        self.sites = {int(site.split(".")[1]): site for site in places}
        self._named: dict[int, Int[Tensor, " top"]] = {}
        for i, site in self.sites.items():
            width = model.d_in(site)
            wanted = list((neurons or {}).get(i, ()))
            if settings.top > width or any(not 0 <= neuron < width for neuron in wanted):
                raise UserError(f"scaling: {site} has neurons 0 to {width - 1}.")
            if neurons is not None:
                self._named[i] = torch.tensor(wanted, dtype=torch.int64)

    @contextmanager
    def applied(self, rows: Bool[Tensor, " batch"], factor: float) -> Iterator[None]:
        """Scale in every forward pass inside the block; the hooks are removed afterwards.

        Args:
            rows: the images to scale on: the attacked ones.
            factor: the factor; at 1 there is no hook.

        Raises:
            SparsightError: a forward pass did not run one of the sites.
        """
        self.chosen = {}
        if factor == 1 or not bool(rows.any()):
            yield
            return
        edits = {site: partial(self._scale, i, rows, factor) for i, site in self.sites.items()}
        with self.model.edit(edits):
            yield
        missed = [site for i, site in self.sites.items() if i not in self.chosen]
        if missed:
            raise SparsightError(
                f"Neurons could not be scaled: the forward pass did not run {', '.join(missed)}."
            )

    def _scale(
        self,
        block: int,
        rows: Bool[Tensor, " batch"],
        factor: float,
        x: Float[Tensor, "batch positions neurons"],
    ) -> Float[Tensor, "batch positions neurons"]:
        rows = rows.to(x.device)
        neurons = self._named.get(block)
        if neurons is None:
            mean = x.detach()[rows].float().mean(dim=(0, 1))
            neurons = mean.topk(self.settings.top).indices
        neurons = neurons.to(x.device)
        self.chosen[block] = neurons.cpu()
        scale = torch.ones(len(x), 1, x.shape[-1], device=x.device, dtype=x.dtype)
        scale[rows.nonzero(), 0, neurons] = factor
        return x * scale
