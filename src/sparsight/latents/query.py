"""Queries of an index: `12 > .5 and 977 > .2 and not 4` gives the images for which it holds."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int64

from sparsight.errors import UserError
from sparsight.figures import percent
from sparsight.images import ImageInfo
from sparsight.latents.expressions import (
    And,
    Condition,
    Not,
    Or,
    Text,
    Token,
    Tree,
    close_to,
    parse,
)
from sparsight.latents.heatmaps import has_heatmaps, latent_values
from sparsight.latents.image_sets import (
    AllOf,
    AnyOf,
    Asked,
    Fires,
    ImageSet,
    Labelled,
    Without,
    counted,
)
from sparsight.notebooks import data_frame, html_grid
from sparsight.sae import SparseCode
from sparsight.text import shortened

if TYPE_CHECKING:
    import pandas

    from sparsight.latents.index import LatentIndex

OPERAND = "a latent (its number, or its name in quotes), `label`, `not` or `(`"
SHOWN_LABELS = 10


@dataclass(frozen=True)
class LabelShare:
    """How common a label is among the images that a query found, and in the whole collection.

    Attributes:
        label: the label.
        n: found images that have it.
        share: share of the found images that have it.
        total: images of the collection that have it.
        base_share: share of the collection's images that have it.
        lift: `share / base_share`.
    """

    label: str
    n: int
    share: float
    total: int
    base_share: float

    @property
    def lift(self) -> float:
        """How many times as common the label is as in the collection."""
        return self.share / self.base_share


@dataclass(frozen=True, repr=False)
class QueryResult:
    """The images for which a query holds.

    Attributes:
        query: the query as it was written.
        latents: the latents that it mentions, in the order of their mention.
        places: places of the images in the source, rising.
    """

    query: str
    latents: tuple[int, ...]
    places: Int64[np.ndarray, " images"]
    index: LatentIndex = field(compare=False)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def activations(self) -> Float32[np.ndarray, "images latents"]:
        """The strongest activation in each image of the latents that the query mentions; 0 where a
        latent does not fire.
        """
        collection, places = self.index.collection, self.places.astype(np.int32)
        columns = [collection.values_at(latent, places) for latent in self.latents]
        if not columns:
            return np.zeros((len(places), 0), dtype=np.float32)
        return np.stack(columns, axis=1)

    @cached_property
    def labels(self) -> list[LabelShare]:
        """The labels of the images, the most frequent first; [] if no image has one."""
        collection = self.index.collection
        names, totals = collection.label_names, collection.label_totals
        counts = counted(collection.label_numbers[self.places], len(names))
        n_read = len(collection.read)
        shares = [
            LabelShare(
                names[i], int(n), int(n) / len(self), int(totals[i]), int(totals[i]) / n_read
            )
            for i, n in enumerate(counts)
            if n
        ]
        return sorted(shares, key=lambda share: (-share.n, -share.lift, share.label))

    def infos(self, limit: int | None = None) -> list[ImageInfo]:
        """Return id, origin, label and caption of the images, in the order of `places`.

        Args:
            limit: number of images; default: all.
        """
        return [ImageInfo(*(row[key] for key in _INFO)) for row in self._rows(limit)]

    def strongest_order(self) -> Int64[np.ndarray, " images"]:
        """Return the order of the images by the activation, strongest first, of the first latent of
        the query that fires in any of them.
        """
        fires = np.flatnonzero((self.activations != 0).any(axis=0))
        if not len(fires):
            return np.arange(len(self))
        return np.argsort(-self.activations[:, fires[0]], kind="stable")

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per image: `image`, `id`, `label`, and `latent_N` for each latent.

        Raises:
            MissingExtra: pandas is not installed.
        """
        rows = self._rows(None)
        columns: dict[str, Any] = {"image": self.places}
        columns |= {key: [row[key] for row in rows] for key in ("id", "label")}
        for number, latent in enumerate(self.latents):
            columns[f"latent_{latent}"] = self.activations[:, number]
        return data_frame(columns)

    def _rows(self, limit: int | None) -> list[dict[str, Any]]:
        rows = np.searchsorted(self.index.image_places, self.places[:limit])
        found: list[dict[str, Any]] = self.index.images.take(rows).to_pylist()
        return found

    def __repr__(self) -> str:
        shares = [f"{share.label} {share.n:,} (lift {share.lift:.1f})" for share in self.labels[:3]]
        more = ", …" if len(self.labels) > len(shares) else ""
        labels = f", {', '.join(shares)}{more}" if shares else ""
        n_read = len(self.index.image_places)
        return f"QueryResult({self.query!r}, {len(self):,} of {n_read:,} images{labels})"

    def _repr_html_(self) -> str:
        n_read = len(self.index.image_places)
        head = f"<p><code>{html.escape(self.query)}</code>: {len(self):,} of {n_read:,} images</p>"
        if not self.labels:
            return head
        hidden = len(self.labels) - SHOWN_LABELS
        return head + html_grid(
            ["label", "images", "share", "in the collection", "lift"],
            [
                [share.label, f"{share.n:,}", percent(share.share), percent(share.base_share),
                 f"{share.lift:.2f}"]
                for share in self.labels[:SHOWN_LABELS]
            ],
            f"and {hidden} more labels" if hidden > 0 else "",
        )  # fmt: skip


_INFO = ("id", "uri", "label", "caption")


@dataclass(frozen=True, repr=False)
class PatchResult:
    """The positions of one image at which a query holds.

    Attributes:
        query: the query as it was written.
        latents: the latents that it mentions, in the order of their mention.
        positions: whether the query holds at each position that the SAE reads.
        activations: the activations of these latents at each position.
        grid: whether the query holds at each patch, row 0 at the top; None if the SAE reads no
            patches.
    """

    query: str
    latents: tuple[int, ...]
    positions: Bool[np.ndarray, " tokens"]
    activations: Float32[np.ndarray, "tokens latents"]
    grid: Bool[np.ndarray, "rows columns"] | None

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Row and column of each patch at which the query holds, in reading order."""
        if self.grid is None:
            return []
        return [(int(row), int(column)) for row, column in np.argwhere(self.grid)]

    def __repr__(self) -> str:
        return (
            f"PatchResult({self.query!r}, {int(self.positions.sum())} of {len(self.positions)} "
            "positions)"
        )


def query(index: LatentIndex, text: str) -> QueryResult:
    """Find the images of an index for which a query holds; see `LatentIndex.query`."""
    collection = index.collection
    asked, latents = _Reader(text, index).read()
    found: ImageSet = asked.images(collection)
    return QueryResult(text, latents, found.within(collection), index)


def query_patches(index: LatentIndex, text: str, code: SparseCode) -> PatchResult:
    """Find the positions of one image at which a query holds; see `LatentIndex.query_patches`."""
    if code.n_latents != index.n_latents:
        raise UserError(
            f"The code has {code.n_latents} latents, but {index.folder} is about {index.n_latents}."
        )
    asked, latents = _Reader(text, index, patches=True).read()
    values = latent_values(code, latents).cpu().numpy()
    columns = dict(zip(latents, values.T, strict=True))
    mask = _holds_at(asked, columns)
    grid = None
    patch_grid = index.manifest["model"].get("patch_grid")
    if patch_grid and has_heatmaps(index.tokens, index.site):
        rows, width = patch_grid
        grid = mask[len(mask) - rows * width :].reshape(rows, width)
    return PatchResult(text, latents, mask, values, grid)


def latents_called(index: LatentIndex, name: str) -> list[int]:
    """Return the latents with a name, in any case of letters; the best names come first."""
    table = index.table.select(["latent", "name", "name_score"])
    table = table.filter(pc.equal(pc.utf8_lower(table["name"]), name.lower()))
    rows = sorted(table.to_pylist(), key=lambda row: -(row["name_score"] or 0.0))
    return [row["latent"] for row in rows]


def _holds_at(asked: Asked, columns: Mapping[int, Any]) -> Bool[np.ndarray, " tokens"]:
    """Return at which positions a condition without labels holds."""
    match asked:
        case Fires():
            return asked.test(columns[asked.latent])
        case Without(term):
            return ~_holds_at(term, columns)
        case AllOf(terms):
            all_hold: Bool[np.ndarray, " tokens"] = np.all(
                [_holds_at(term, columns) for term in terms], axis=0
            )
            return all_hold
        case AnyOf(terms):
            any_hold: Bool[np.ndarray, " tokens"] = np.any(
                [_holds_at(term, columns) for term in terms], axis=0
            )
            return any_hold
        case Labelled():
            raise AssertionError("labels are refused for patches")


class _Reader:
    """What the words of a query mean in an index."""

    def __init__(self, text: str, index: LatentIndex, *, patches: bool = False) -> None:
        self.text = Text(text, "Query")
        self.index = index
        self.patches = patches
        self.latents: dict[int, None] = {}

    def read(self) -> tuple[Asked, tuple[int, ...]]:
        """Return the conditions, and the latents in the order of their mention."""
        asked = self.asked(parse(self.text, OPERAND))
        return asked, tuple(self.latents)

    def asked(self, tree: Tree) -> Asked:
        match tree:
            case Not(term):
                return Without(self.asked(term))
            case And(terms):
                return AllOf(tuple(self.asked(term) for term in terms))
            case Or(terms):
                return AnyOf(tuple(self.asked(term) for term in terms))
            case Condition():
                if tree.subject.kind == "word":
                    return self.labelled(tree)
                return self.fires(tree)

    def fires(self, condition: Condition) -> Fires:
        latent = self.latent(condition.subject)
        self.latents[latent] = None
        if condition.comparison is None:
            return Fires(latent)
        if condition.comparison == "in":
            raise self.text.wrong(
                condition.values[0],
                "`in` is for labels; compare an activation by `>`, `>=`, `<` or `<=`.",
            )
        value = condition.values[0]
        if value.kind != "number":
            raise self.text.unexpected(value, f"an activation after `{condition.comparison}`")
        return Fires(latent, condition.comparison, float(value.value))

    def latent(self, subject: Token) -> int:
        if subject.kind == "number":
            if not subject.written.isdecimal():
                raise self.text.unexpected(subject, "a latent, which is a whole number")
            latent = int(subject.written)
            if latent >= self.index.n_latents:
                raise self.text.wrong(
                    subject,
                    f"no latent {latent}; the index has 0 to {self.index.n_latents - 1}.",
                )
            return latent
        name = str(subject.value)
        latents = latents_called(self.index, name)
        if len(latents) > 1:
            listed = ", ".join(map(str, latents[:8])) + (", …" if len(latents) > 8 else "")
            raise self.text.wrong(
                subject, f"{len(latents)} latents are named {name!r} ({listed}); give a number."
            )
        if not latents:
            known = self.index.table["name"].unique().drop_null().to_pylist()
            raise self.text.wrong(
                subject, f"no latent is named {shortened(name)!r}.{close_to(name, known)}"
            )
        return latents[0]

    def labelled(self, condition: Condition) -> Asked:
        subject = condition.subject
        if str(subject.value).lower() != "label":
            raise self.text.unexpected(subject, OPERAND)
        if self.patches:
            raise self.text.wrong(subject, "patches have no labels; ask about latents.")
        if condition.comparison not in ("==", "!=", "in"):
            value = condition.values[0] if condition.values else subject
            raise self.text.wrong(
                value, 'compare a label by `==`, `!=` or `in`: `label == "star"`.'
            )
        found = Labelled(tuple(self.label(value) for value in condition.values))
        return Without(found) if condition.comparison == "!=" else found

    def label(self, value: Token) -> int:
        if value.kind != "text":
            raise self.text.unexpected(value, "a label in quotes")
        names = self.index.collection.label_names
        if value.value not in names:
            label = str(value.value)
            raise self.text.wrong(
                value, f"no image has the label {shortened(label)!r}.{close_to(label, names)}"
            )
        return names.index(str(value.value))
