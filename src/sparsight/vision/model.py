"""`VisionModel`: name the sites of a vision transformer, read them, edit them, embed with it."""

from __future__ import annotations

import difflib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sparsight.devices import choose_device
from sparsight.errors import SparsightError, UserError
from sparsight.vision.hashing import weights_hash
from sparsight.vision.hooks import Edit, Place, StopForward, checked, touching
from sparsight.vision.probe import Anatomy, Site, probe
from sparsight.vision.texts import TextEmbedder
from sparsight.vision.tokens import Tokens, check_tokens, select_tokens
from sparsight.vision.tower import Tower

Transform = Callable[[Image.Image], Tensor]
"""A picklable function from an image to float32 `[3, height, width]`."""

JPEG_MARGIN = 2
"""Least shorter side of a JPEG that is scaled while decoding, as a multiple of the input's side."""

# No site depends on these, and many checkpoints leave them untrained: not part of the identity.
_UNUSED_WEIGHTS = ("mask_token",)


class VisionModel(TextEmbedder):
    """A vision transformer and its sites; made by `load_model`.

    The sites, for block numbers i from 0, are:

    - `blocks.{i}.resid_pre`, `blocks.{i}.resid_post`: the residual stream before and after
      block i.
    - `blocks.{i}.attn_out`, `blocks.{i}.mlp_out`: what attention and MLP **add** to it (after
      LayerScale if the block has it).
    - `blocks.{i}.mlp_pre`, `blocks.{i}.mlp_post`: the neurons of the MLP before and after their
      activation function: the output of its first linear map and the input of its second. A gated
      MLP has `mlp_post` only.
    - `final_norm`: the output of the last normalisation. It has all positions in SigLIP, DINOv2,
      ViT and open_clip; `transformers`' CLIP normalises only its CLS position, and so has one
      position here.
    - `embedding`: the joint embedding of images and texts (CLIP's projection, SigLIP's pooled
      head), one position; only if the model has one.

    Weights are frozen (`requires_grad` is off), so that gradients flow through the model to
    pixels and edits without a graph for every weight.

    Attributes:
        id: what `load_model` was called with; the full path of a local folder.
        revision: the Hub commit, if it is known.
        family: the architecture's name: `clip`, `siglip`, `dinov2`, `vit`, …
        module: the underlying torch module (text tower included).
        transform: picklable function from an image to float32 `[3, height, width]`.
        preprocessing: JSON-able description of `transform`.
        input_shape: channels, height and width of the output of `transform`.
        n_blocks: number of transformer blocks.
        n_tokens: number of positions of the residual stream.
        n_prefix: number of positions before the patches: CLS, then registers.
        has_cls: whether position 0 is a CLS position.
        patch_grid: rows and columns of patches.
        sites: every site, in forward order.
        has_text: whether `embed_texts` is available.
    """

    min_side: int | None = None
    """Pixels to which the shorter side of a JPEG may be scaled while it is decoded; None: JPEGs are
    not scaled. See `scale_jpegs`."""

    def __init__(
        self,
        *,
        id: str,
        revision: str | None,
        family: str,
        module: nn.Module,
        tower: Tower,
        embedding: Place | None,
        projection: Sequence[Tensor] = (),
        transform: Transform,
        preprocessing: dict[str, Any],
        input_shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.id = id
        self.revision = revision
        self.family = family
        self.module = module.eval().requires_grad_(False)
        self.transform = transform
        self.preprocessing = preprocessing
        self.input_shape = input_shape
        self._tower = tower
        self._projection = tuple(projection)
        self.module.to(device=device, dtype=torch.float32)
        self.has_cls = False
        self._anatomy: Anatomy = probe(
            id, tower, embedding, self._embed, input_shape, self._position_hint()
        )
        if dtype != torch.float32:
            _ = self.weights_hash  # before the cast, which is not part of the model's identity
        self._cast(dtype)
        self.n_blocks = self._anatomy.n_blocks
        self.n_tokens = self._anatomy.n_tokens
        self.n_prefix = self._anatomy.n_prefix
        self.has_cls = self._anatomy.has_cls
        self.patch_grid = self._anatomy.patch_grid
        self.sites = tuple(self._anatomy.sites)

    @abstractmethod
    def _embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "rows d"]:
        """Run the whole vision part and return its image embedding."""

    @property
    def tower(self) -> Tower:
        """The parts of the vision transformer, for code that changes its weights."""
        return self._tower

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._tower.patches.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type; activations are read in it."""
        return self._tower.patches.weight.dtype

    @cached_property
    def weights_hash(self) -> str:
        """The hex SHA-256 of the vision weights in float32, whatever dtype the model runs in.

        It covers embeddings, blocks, final norm and projection, but not poolers and mask tokens
        that no site depends on, nor names, which differ between versions of a library.
        """
        return weights_hash(self._weight_groups())

    def scale_jpegs(self) -> Self:
        """Decode large JPEGs at a reduced size from now on, and return the model.

        Their shorter side keeps at least twice the pixels that the preprocessing resizes to, so
        that its own filter still does the last reduction by two or more. `preprocessing` records
        the setting.
        """
        named = self.preprocessing.get("size")
        given = named.values() if isinstance(named, dict) else named
        sides = [given] if isinstance(given, int) else list(given or ())
        target = max([*self.input_shape[1:], *(side for side in sides if isinstance(side, int))])
        self.min_side = JPEG_MARGIN * target
        self.preprocessing = {**self.preprocessing, "jpeg_min_side": self.min_side}
        return self

    def to(self, device: str | torch.device) -> Self:
        """Move the model to `device`, and return it.

        Raises:
            UserError: torch does not find the device.
        """
        self.module.to(choose_device(device))
        return self

    def canonical_site(self, site: str) -> str:
        """Return a site's canonical name: `blocks.-1.resid_post` → `blocks.11.resid_post`.

        Raises:
            UserError: the model lacks the site; the message lists the sites that it has.
        """
        name = count_from_start(site, self.n_blocks)
        if name in self._anatomy.sites:
            return name
        close = difflib.get_close_matches(name, self.sites, n=3, cutoff=0.75)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{self.id} has no site {site!r}.{hint} Its sites: {self._site_summary()}.")

    def d_in(self, site: str) -> int:
        """Return the width of the activations at `site`."""
        return self._site(site).d_in

    def token_count(self, site: str, tokens: Tokens = "all") -> int:
        """Return how many vectors one image gives at `site`.

        Raises:
            UserError: the site is unknown, or lacks these tokens.
        """
        check_tokens(tokens, self.has_cls)
        if self._site(site).per_image:
            self._check_per_image(site, tokens)
            return 1
        n_patches = self.n_tokens - self.n_prefix
        return {"all": self.n_tokens, "patches": n_patches, "cls": 1, "mean": 1}[tokens]

    @torch.no_grad()
    def read(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        sites: Sequence[str] | str,
        tokens: Tokens = "all",
    ) -> dict[str, Float[Tensor, "batch tokens d_in"]]:
        """Read activations at `sites` in one forward pass, which stops after the last of them.

        Neither the text tower nor any block after the last site runs. Active edits take effect.
        `embedding` gives its one vector whatever `tokens` is.

        Args:
            pixels: preprocessed images (`transform`), on any device.
            sites: names; negative block numbers count from the end.
            tokens: which positions to keep.

        Returns:
            Activations by the names that were given, on `device`, in `dtype`, without gradients.

        Raises:
            UserError: a site is unknown or lacks these tokens, or `pixels` has another shape.
        """
        asked = [sites] if isinstance(sites, str) else list(sites)
        if not asked:
            raise UserError(f"No site to read is named. {self.id} has: {self._site_summary()}.")
        names = {site: self.canonical_site(site) for site in asked}
        wanted = set(names.values())
        for site in wanted:
            self.token_count(site, tokens)
        found: dict[str, Tensor] = {}

        def catcher(site: str) -> Callable[[Tensor], None]:
            def catch(x: Tensor) -> None:
                found[site] = self._select(x, site, tokens)
                if len(found) == len(wanted):
                    raise StopForward

            return catch

        with ExitStack() as stack:
            for site in wanted:
                stack.enter_context(touching(self._anatomy.sites[site].place, catcher(site)))
            try:
                self._embed(self._prepare(pixels))
            except StopForward:
                pass
            else:
                missing = ", ".join(sorted(wanted - set(found)))
                raise SparsightError(f"{self.id}: the forward pass never reached {missing}.")
        return {site: found[name] for site, name in names.items()}

    @contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Replace activations at sites in every forward pass inside the `with` block.

        Each function maps a site's `[batch, positions, d_in]` (on `device`, in `dtype`) to a
        tensor of the same shape; its result is cast to the model's dtype. Blocks nest: the inner
        edit of a site gets the output of the outer one. Gradients flow through edits. The edits
        end with the block, even after an exception.

        Raises:
            UserError: a site is unknown or given twice; or, in the forward pass, an edit returned
                a tensor of another shape or on another device.
        """
        canonical: dict[str, Edit] = {}
        for site, edit in edits.items():
            name = self.canonical_site(site)
            if name in canonical:
                raise UserError(
                    f"The site {name} is edited twice in one call; combine the two edits into one."
                )
            canonical[name] = edit
        with ExitStack() as stack:
            for name, edit in canonical.items():
                stack.enter_context(touching(self._anatomy.sites[name].place, checked(name, edit)))
            yield

    def embed_images(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "rows d_embed"]:
        """Embed images, in float32, not normalised; active edits take effect.

        There is one row per image, unless an edit changes the number of rows. A row is the joint
        embedding if the model has one (site `embedding`), otherwise the CLS vector after the final
        norm, or the mean over positions if there is no CLS. Runs under autograd if gradients are
        on.
        """
        return self._embed(self._prepare(pixels)).float()

    @property
    def has_joint_space(self) -> bool:
        """Whether `embed_images` gives vectors in the same space as those of texts."""
        return "embedding" in self.sites

    @property
    def image_embedding(self) -> str:
        """A description of what `embed_images` returns, in words."""
        if self.has_joint_space:
            return "the joint embedding of images and texts"
        if self.has_cls:
            return "CLS after the final norm (there is no joint space with texts)"
        return "the mean over positions after the final norm (there is no joint space with texts)"

    def __repr__(self) -> str:
        rows, columns = self.patch_grid
        return (
            f"VisionModel({self.id!r}, {self.family}, {self.n_blocks} blocks, {self.n_tokens} "
            f"positions ({self.n_prefix} prefix + {rows} × {columns} patches), "
            f"{self.dtype} on {self.device})"
        )

    def _position_hint(self) -> str:
        """Name a setting that may be why a model's positions are refused, for the message."""
        return ""

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the weights to `dtype`, except for the two numbers that logits depend on."""
        names = ("logit_scale", "logit_bias")
        exact = {name: getattr(self.module, name, None) for name in names}
        kept = {name: x.detach().clone() for name, x in exact.items() if isinstance(x, Tensor)}
        self.module.to(dtype=dtype)
        for name, value in kept.items():
            getattr(self.module, name).data = value

    def _site(self, site: str) -> Site:
        return self._anatomy.sites[self.canonical_site(site)]

    def _check_per_image(self, site: str, tokens: Tokens) -> None:
        if self.canonical_site(site) == "final_norm" and tokens in ("patches", "mean"):
            raise UserError(
                f"final_norm: {self.id} normalises only its CLS position, so tokens={tokens!r} is "
                f"not possible. Use 'cls' or 'all', or blocks.{self.n_blocks - 1}.resid_post."
            )

    def _select(self, x: Tensor, site: str, tokens: Tokens) -> Tensor:
        if self._anatomy.sites[site].per_image:
            return x
        return select_tokens(x, tokens, self.n_prefix, self.has_cls)

    def _prepare(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != self.input_shape[0]:
            raise UserError(
                f"{self.id} takes a batch of images [batch, {self.input_shape[0]}, height, "
                f"width], found shape {list(pixels.shape)}. Stack the results of "
                "model.transform(image) with torch.stack."
            )
        return pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)

    def _site_summary(self) -> str:
        parts = [site.split(".")[-1] for site in self.sites if site.startswith("blocks.0.")]
        rest = [site for site in self.sites if not site.startswith("blocks.")]
        blocks = f"blocks.{{0..{self.n_blocks - 1}}}.{{{', '.join(parts)}}}"
        return ", ".join([blocks, *rest])

    def _weight_groups(self) -> dict[str, list[Tensor]]:
        """Group the vision weights by part of the model."""
        groups: dict[str, list[Tensor]] = {"projection": list(self._projection)}
        inside_blocks: set[int] = set()
        for i, block in enumerate(self._tower.blocks):
            groups[f"blocks.{i}"] = list(block.parameters())
            inside_blocks.update(map(id, block.parameters()))
        groups["rest"] = [
            weight
            for name, weight in used_parameters(self._tower)
            if id(weight) not in inside_blocks
        ]
        return groups


def count_from_start(site: str, n_blocks: int) -> str:
    """Count a negative block number in a site's name from the end: `blocks.-1.` of 12 → 11."""
    return re.sub(r"^blocks\.(-\d+)\.", lambda found: f"blocks.{n_blocks + int(found[1])}.", site)


def used_parameters(tower: Tower) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the tower's parameters that some site depends on, with their names in the tower."""
    for name, weight in tower.module.named_parameters():
        if not name.startswith("pooler.") and not name.endswith(_UNUSED_WEIGHTS):
            yield name, weight
