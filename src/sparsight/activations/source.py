"""The interface of a source of activations, whether on disk or computed on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from sparsight.activations.statistics import SiteStatistics
from sparsight.activations.stream import VectorStream
from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.vision import Tokens, VisionModel


@dataclass(frozen=True)
class OrderedBatch:
    """Activations of consecutive images.

    Attributes:
        image_indices: places of the images in their source.
        activations: for each site, float32.
    """

    image_indices: Int[Tensor, " batch"]
    activations: dict[str, Float[Tensor, "batch tokens d_in"]]


@runtime_checkable
class ActivationSource(Protocol):
    """Activations of a model on images, such as `ActivationStore` and `LiveActivations`."""

    sites: tuple[str, ...]
    """Canonical names of the sites."""

    tokens: str
    """Which positions: "all", "patches", "cls" or "mean"."""

    model_info: Mapping[str, Any]
    """Id, revision, family, weight hash and preprocessing; `images` is the spec of the images."""

    @property
    def fingerprint(self) -> str:
        """Return a hex digest, the same for sources with the same vectors in the same order."""

    def canonical_site(self, site: str) -> str:
        """Return the canonical name of a site; negative block numbers count from the end.

        Raises:
            UserError: the source has no such site.
        """

    @property
    def n_images(self) -> int:
        """The number of images that have activations."""

    @property
    def n_tokens(self) -> Mapping[str, int]:
        """The number of vectors per image at each site."""

    def d_in(self, site: str) -> int:
        """Return the width of a site's vectors."""

    def stats(self, site: str) -> SiteStatistics:
        """Return the statistics of a site."""

    def source(self) -> ImageSource:
        """Return the images."""

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> VectorStream:
        """Stream vectors without end, shuffled; the same positions at each site."""

    def ordered(
        self, sites: Sequence[str], batch_images: int = 64, *, after: int | None = None
    ) -> Iterator[OrderedBatch]:
        """Give all images once, in order.

        With `after`, the place of an image in the source, give only the batches that follow the one
        with that image, divided as in a whole pass.
        """


def matching_sites(
    asked: Sequence[str], available: Sequence[str], canonical: Callable[[str], str]
) -> tuple[str, ...]:
    """Return the sites that are asked for, each once; `*` stands for any block number.

    Args:
        asked: names, or patterns such as "blocks.*.resid_post".
        available: canonical names of all sites.
        canonical: maps any name to the canonical one.

    Raises:
        UserError: a pattern fits no site; or as `canonical` raises.
    """
    chosen: list[str] = []
    for asked_site in asked:
        if "*" not in asked_site:
            chosen.append(canonical(asked_site))
            continue
        fitting = [site for site in available if fnmatchcase(site, asked_site)]
        if not fitting:
            raise UserError(f"No site fits {asked_site!r}; there are: {', '.join(available)}.")
        chosen += fitting
    return tuple(dict.fromkeys(chosen))


def count_tokens(model: VisionModel, sites: Sequence[str], tokens: str) -> dict[str, int]:
    """Return how many vectors an image gives at each site.

    Raises:
        UserError: a site does not have these positions, or patches are asked for and no site has
            any.
    """
    counts = {site: model.token_count(site, cast(Tokens, tokens)) for site in sites}
    if tokens == "patches" and {*counts} == {"embedding"}:
        raise UserError(
            "embedding: has one position per image and no patches, so tokens='patches' is not "
            "available. Use 'all', or a site such as blocks.-1.resid_post."
        )
    return counts


def same_count(sites: Sequence[str], n_tokens: Mapping[str, int]) -> int:
    """Return how many vectors an image gives at each of these sites.

    Raises:
        UserError: the numbers differ, so that positions have no counterparts.
    """
    if not sites:
        raise UserError("Name at least one site.")
    counts = {site: n_tokens[site] for site in sites}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{site} ({n})" for site, n in counts.items())
        raise UserError(
            f"An image gives different numbers of vectors at {listed}: they cannot be streamed "
            "together. Use them one by one."
        )
    return next(iter(counts.values()))


def with_tokens(source: ActivationSource, tokens: Tokens | None) -> ActivationSource:
    """Return the activations at some positions: the source itself, or a view of one that has more.

    Raises:
        UserError: the source does not have these positions, or cannot give views.
    """
    if tokens in (None, source.tokens):
        return source
    view: Callable[[str], ActivationSource] | None = getattr(source, "with_tokens", None)
    if view is None:
        raise UserError(other_tokens(str(tokens), source.tokens))
    return view(str(tokens))


def other_tokens(asked: str, own: str) -> str:
    """Return the message for positions that a source does not have."""
    return (
        f"tokens is {asked!r}, but the activations are of {own!r}. Leave it out, or extract with "
        f"tokens={asked!r}."
    )
