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
"""A picklable function from a picture to float32 `[3, height, width]`."""

JPEG_MARGIN = 2
"""Least shorter side of a JPEG that is scaled while decoded, in sides of the model's input."""

# Read by nothing that a site offers: untrained in many checkpoints, so not part of an identity.
_UNUSED_WEIGHTS = ("mask_token",)


class VisionModel(TextEmbedder):
    """A vision transformer and the names of its inside; made by `load_model`.

    Sites, for block numbers i from 0:

    - `blocks.{i}.resid_pre`, `blocks.{i}.resid_post`: the residual stream before and after
      block i.
    - `blocks.{i}.attn_out`, `blocks.{i}.mlp_out`: what attention and MLP **add** to it (after
      LayerScale where there is one).
    - `blocks.{i}.mlp_pre`, `blocks.{i}.mlp_post`: the neurons of the MLP before and after their
      activation function: what its first linear map gives, what its second one takes. An MLP with
      a gate has `mlp_post` alone.
    - `final_norm`: what comes out of the last normalisation. All positions in SigLIP, DINOv2, ViT
      and open_clip; `transformers`' CLIP normalises its CLS position alone, and so has one
      position here.
    - `embedding`: the joint embedding of pictures and texts (CLIP's projection, SigLIP's pooled
      head), one position; only where the model has one.

    Weights are frozen (`requires_grad` is off), so that gradients flow through the model to
    pixels and edits without a graph for every weight.

    Attributes:
        id: what `load_model` was called with; the full path of a local folder.
        revision: the Hub commit, where it is known.
        family: the architecture's name: `clip`, `siglip`, `dinov2`, `vit`, ...
        module: the underlying torch module (text tower included).
        transform: picklable, picture -> float32 `[3, height, width]`.
        preprocessing: JSON-able description of `transform`.
        input_shape: channels, height and width that `transform` gives.
        n_blocks: number of transformer blocks.
        n_tokens: positions of the residual stream.
        n_prefix: how many of them are no patches: CLS, then registers.
        has_cls: whether position 0 is a CLS position.
        patch_grid: rows and columns of patches.
        sites: every site, in forward order.
        has_text: whether `embed_texts` is there.
    """

    min_side: int | None = None
    """To how many pixels the shorter side of a JPEG may be scaled while it is decoded; None: none
    is scaled. See `scale_jpegs`."""

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
            _ = self.weights_hash  # before the cast, which is no part of the model's identity
        self._cast(dtype)
        self.n_blocks = self._anatomy.n_blocks
        self.n_tokens = self._anatomy.n_tokens
        self.n_prefix = self._anatomy.n_prefix
        self.has_cls = self._anatomy.has_cls
        self.patch_grid = self._anatomy.patch_grid
        self.sites = tuple(self._anatomy.sites)

    @abstractmethod
    def _embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "rows d"]:
        """Run the vision part whole and give its image embedding."""

    @property
    def tower(self) -> Tower:
        """The parts of the vision transformer, for who changes its weights."""
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
        """Hex SHA-256 over the vision weights in float32, whatever dtype the model runs in.

        Embeddings, blocks, final norm and projection; not poolers and mask tokens that no site
        sees, nor names, which differ between versions of a library.
        """
        return weights_hash(self._weight_groups())

    def scale_jpegs(self) -> Self:
        """Decode large JPEGs at a part of their size from now on, and give the model back.

        Their shorter side keeps twice the pixels that the preprocessing resizes to, so that its
        own filter still does the last reduction by two or more. `preprocessing` records it.
        """
        named = self.preprocessing.get("size")
        given = named.values() if isinstance(named, dict) else named
        sides = [given] if isinstance(given, int) else list(given or ())
        target = max([*self.input_shape[1:], *(side for side in sides if isinstance(side, int))])
        self.min_side = JPEG_MARGIN * target
        self.preprocessing = {**self.preprocessing, "jpeg_min_side": self.min_side}
        return self

    def to(self, device: str | torch.device) -> Self:
        """Move the model to `device`, and give it back.

        Raises:
            UserError: torch finds no such device.
        """
        self.module.to(choose_device(device))
        return self

    def canonical_site(self, site: str) -> str:
        """The site's one true name: `blocks.-1.resid_post` → `blocks.11.resid_post`.

        Raises:
            UserError: the model has no such site; the message lists what it has.
        """
        name = count_from_start(site, self.n_blocks)
        if name in self._anatomy.sites:
            return name
        close = difflib.get_close_matches(name, self.sites, n=3, cutoff=0.75)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{self.id} has no site {site!r}.{hint} Its sites: {self._site_summary()}.")

    def d_in(self, site: str) -> int:
        """Width of the activations at `site`."""
        return self._site(site).d_in

    def token_count(self, site: str, tokens: Tokens = "all") -> int:
        """How many vectors one image gives at `site`.

        Raises:
            UserError: the site is unknown, or has no such tokens.
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
        """Read activations at `sites` in one forward pass, stopped once the last is there.

        The text tower never runs, nor does any block behind the last site. Edits that are active
        are seen. `embedding` gives its one vector whatever `tokens` is.

        Args:
            pixels: preprocessed pictures (`transform`), on any device.
            sites: names; negative block numbers count from the end.
            tokens: which positions to keep.

        Returns:
            Activations under the names as they were given, on `device`, in `dtype`, without
            gradients.

        Raises:
            UserError: a site is unknown or has no such tokens, or `pixels` has another shape.
        """
        asked = [sites] if isinstance(sites, str) else list(sites)
        if not asked:
            raise UserError(f"No site to read. {self.id} has: {self._site_summary()}.")
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
                raise SparsightError(f"{self.id}: the forward pass never came to {missing}.")
        return {site: found[name] for site, name in names.items()}

    @contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Replace activations at sites in every forward pass inside the `with` block.

        Each function maps a site's `[batch, positions, d_in]` (on `device`, in `dtype`) to a
        tensor of the same shape; what it returns is cast to the model's dtype. Blocks nest: the
        inner edit of a site gets what the outer one made. Gradients flow through edits. The
        edits end with the block, on an exception too.

        Raises:
            UserError: a site is unknown, or given twice; or, in the forward pass, an edit
                returned another shape or device.
        """
        canonical: dict[str, Edit] = {}
        for site, edit in edits.items():
            name = self.canonical_site(site)
            if name in canonical:
                raise UserError(f"The site {name} is edited twice in one call; compose the edits.")
            canonical[name] = edit
        with ExitStack() as stack:
            for name, edit in canonical.items():
                stack.enter_context(touching(self._anatomy.sites[name].place, checked(name, edit)))
            yield

    def embed_images(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "rows d_embed"]:
        """Embed pictures, float32, not normalised; edits that are active are seen.

        A row a picture, unless an edit changes the number of rows.

        The joint embedding where the model has one (site `embedding`). Else the CLS vector after
        the final norm, or the mean over positions where there is no CLS either. Runs under
        autograd if gradients are on.
        """
        return self._embed(self._prepare(pixels)).float()

    @property
    def has_joint_space(self) -> bool:
        """Whether `embed_images` gives vectors in a space with those of texts."""
        return "embedding" in self.sites

    @property
    def image_embedding(self) -> str:
        """What `embed_images` gives, in words."""
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
        """A setting that may be why the positions of a model are refused, for the message."""
        return ""

    def _cast(self, dtype: torch.dtype) -> None:
        """Bring the weights to `dtype`, but for the two numbers that logits depend on."""
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
                f"final_norm: {self.id} normalises its CLS position alone, so tokens={tokens!r} "
                f"is not there. Use 'cls' or 'all', or blocks.{self.n_blocks - 1}.resid_post."
            )

    def _select(self, x: Tensor, site: str, tokens: Tokens) -> Tensor:
        if self._anatomy.sites[site].per_image:
            return x
        return select_tokens(x, tokens, self.n_prefix, self.has_cls)

    def _prepare(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != self.input_shape[0]:
            raise UserError(
                f"{self.id} takes a batch of pictures [batch, {self.input_shape[0]}, height, "
                f"width], found shape {list(pixels.shape)}. Make it with torch.stack of "
                "model.transform(image)."
            )
        return pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)

    def _site_summary(self) -> str:
        parts = [site.split(".")[-1] for site in self.sites if site.startswith("blocks.0.")]
        rest = [site for site in self.sites if not site.startswith("blocks.")]
        blocks = f"blocks.{{0..{self.n_blocks - 1}}}.{{{', '.join(parts)}}}"
        return ", ".join([blocks, *rest])

    def _weight_groups(self) -> dict[str, list[Tensor]]:
        """Vision weights by part of the model."""
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
    """A site's name with a negative block number counted from the end: `blocks.-1.` of 12 → 11."""
    return re.sub(r"^blocks\.(-\d+)\.", lambda found: f"blocks.{n_blocks + int(found[1])}.", site)


def used_parameters(tower: Tower) -> Iterator[tuple[str, nn.Parameter]]:
    """The tower's parameters, by their names in it, that some site depends on."""
    for name, weight in tower.module.named_parameters():
        if not name.startswith("pooler.") and not name.endswith(_UNUSED_WEIGHTS):
            yield name, weight
