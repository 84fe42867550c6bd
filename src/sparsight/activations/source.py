"""What everything that takes activations asks of them, on disk or made on the fly."""

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
    """Activations of some images, in order.

    Attributes:
        image_indices: places of the images in their source.
        activations: for each site, float32.
    """

    image_indices: Int[Tensor, " batch"]
    activations: dict[str, Float[Tensor, "batch tokens d_in"]]


@runtime_checkable
class ActivationSource(Protocol):
    """Activations of a model on images; `ActivationStore` and `LiveActivations` are such."""

    sites: tuple[str, ...]
    """Canonical names of the sites."""

    tokens: str
    """Which positions: "all", "patches", "cls" or "mean"."""

    model_info: Mapping[str, Any]
    """Id, revision, family, hash of the weights, preprocessing; `images` is the images' spec."""

    @property
    def fingerprint(self) -> str:
        """Hex digest that two sources share when they give the same vectors in the same order."""

    def canonical_site(self, site: str) -> str:
        """The site's one true name; negative block numbers count from the end.

        Raises:
            UserError: it is not among the sites.
        """

    @property
    def n_images(self) -> int:
        """Images that activations exist of."""

    @property
    def n_tokens(self) -> Mapping[str, int]:
        """Vectors an image gives at each site."""

    def d_in(self, site: str) -> int:
        """Width of a site's vectors."""

    def stats(self, site: str) -> SiteStatistics:
        """Statistics of a site."""

    def source(self) -> ImageSource:
        """The images."""

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> VectorStream:
        """Vectors without end, shuffled: the same ones at each site."""

    def ordered(
        self, sites: Sequence[str], batch_images: int = 64, *, after: int | None = None
    ) -> Iterator[OrderedBatch]:
        """All images once, in order.

        With `after`, the place of an image in the source: only the batches behind the one that
        has it, each as it is in a whole pass.
        """


def matching_sites(
    asked: Sequence[str], available: Sequence[str], canonical: Callable[[str], str]
) -> tuple[str, ...]:
    """The sites that are asked for, each once; `*` stands for any number of a block.

    Args:
        asked: names, or patterns such as "blocks.*.resid_post".
        available: canonical names of all there are.
        canonical: from any name to the canonical one.

    Raises:
        UserError: a pattern fits none; or what `canonical` raises.
    """
    found: list[str] = []
    for each in asked:
        if "*" not in each:
            found.append(canonical(each))
            continue
        fitting = [site for site in available if fnmatchcase(site, each)]
        if not fitting:
            raise UserError(f"No site fits {each!r}; there are: {', '.join(available)}.")
        found += fitting
    return tuple(dict.fromkeys(found))


def count_tokens(model: VisionModel, sites: Sequence[str], tokens: str) -> dict[str, int]:
    """How many vectors an image gives at each site.

    Raises:
        UserError: a site has no such positions, or patches are asked for where no site has any.
    """
    counts = {site: model.token_count(site, cast(Tokens, tokens)) for site in sites}
    if tokens == "patches" and {*counts} == {"embedding"}:
        raise UserError(
            "embedding: has one position per image and no patches, so tokens='patches' is not "
            "there. Use 'all', or a site such as blocks.-1.resid_post."
        )
    return counts


def same_count(sites: Sequence[str], n_tokens: Mapping[str, int]) -> int:
    """How many vectors an image gives at each of these sites.

    Raises:
        UserError: not the same number at each, so that positions have no counterparts.
    """
    if not sites:
        raise UserError("Name at least one site.")
    counts = {site: n_tokens[site] for site in sites}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{site} ({n})" for site, n in counts.items())
        raise UserError(
            f"An image gives different numbers of vectors at {listed}: they cannot be streamed "
            "together. Take them one by one."
        )
    return next(iter(counts.values()))


def with_tokens(source: ActivationSource, tokens: Tokens | None) -> ActivationSource:
    """The activations of some positions: the source itself, or a view of one that has more.

    Raises:
        UserError: the source does not have these positions, or gives no views.
    """
    if tokens in (None, source.tokens):
        return source
    view: Callable[[str], ActivationSource] | None = getattr(source, "with_tokens", None)
    if view is None:
        raise UserError(other_tokens(str(tokens), source.tokens))
    return view(str(tokens))


def other_tokens(asked: str, own: str) -> str:
    """What is said to who asks for positions that are not there."""
    return (
        f"tokens is {asked!r}, the activations are of {own!r}. Leave it out, or extract with "
        f"tokens={asked!r}."
    )
