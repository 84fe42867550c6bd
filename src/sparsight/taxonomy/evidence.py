"""Kinds that the names and labels of a latent index imply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sparsight.errors import UserError
from sparsight.latents import LatentIndex
from sparsight.naming import LatentActivations, NameTable, Vocabulary
from sparsight.naming.labels import LabelMethod
from sparsight.naming.names_file import OPINIONS, TRUTH, precedence
from sparsight.naming.vocabulary import open_vocabulary
from sparsight.sae import SparseAutoencoder

CATEGORY_KINDS = {
    "colour": "colour",
    "texture": "texture",
    "material": "texture",
    "part": "part",
    "animal": "object",
    "plant": "object",
    "food": "object",
    "person": "object",
    "object": "object",
    "scene": "scene",
    "weather": "scene",
    "text": "text",
}
"""The kind of each category of words. Shapes, actions and styles are of no kind."""


@dataclass(frozen=True)
class Evidence:
    """What an index says about the kinds of its latents.

    Attributes:
        names: latent → kind of the category of its accepted name.
        labels: latents that stand for a label: one that most of the images in which they are
            strongly active have, on images that did not choose it, too.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    labels: frozenset[int] = frozenset()

    @classmethod
    def of(cls, index: LatentIndex, sae: SparseAutoencoder, *, truth: bool = True) -> Evidence:
        """Read the evidence of an index; names by label count as labels.

        Args:
            index: the index, of format version 2.
            sae: the SAE that it is of.
            truth: let names from ground truth count.

        Raises:
            UserError: the index has format version 1 or is of another SAE, or the vocabulary of
                its names is gone.
        """
        if index.version < 2:
            raise UserError(
                f"{index.folder}: has format version 1, without the lists that the taxonomy reads. "
                "Upgrade it with `sparsight index RUN --upgrade`."
            )
        index.check_sae(sae)
        return cls(kinds_by_name(NameTable.of(index), truth), _labelled(index, sae))


def kinds_by_name(table: NameTable, truth: bool) -> dict[int, str]:
    """Return the kinds that accepted names imply; the method that comes first decides."""
    kinds: dict[int, tuple[tuple[int, str], str]] = {}
    vocabularies: dict[str, Vocabulary] = {}
    for row in table.rows.to_pylist():
        method, about = row["method"], table.about[row["method"]].get("vocabulary")
        if not row["accepted"] or method == "labels" or method in OPINIONS:
            continue
        if method == TRUTH:
            if not truth:
                continue
            about = {"name": "calibration"}
        if about is None:
            continue
        source = about["name"]
        if source not in vocabularies:
            vocabularies[source] = _vocabulary(source)
        kind = CATEGORY_KINDS.get(vocabularies[source].category_of(row["name"]) or "")
        rank = precedence(method)
        if kind and (row["latent"] not in kinds or rank < kinds[row["latent"]][0]):
            kinds[row["latent"]] = rank, kind
    return {latent: kind for latent, (_, kind) in kinds.items()}


def _vocabulary(source: str) -> Vocabulary:
    try:
        return open_vocabulary(source)
    except UserError as error:
        raise UserError(
            f"The names of the latents come from the vocabulary {source!r}, whose categories are "
            f"needed, but it cannot be opened: {error}"
        ) from error


def _labelled(index: LatentIndex, sae: SparseAutoencoder) -> frozenset[int]:
    """Return the latents that stand for a label by `LabelMethod`."""
    labels = index.images["label"].to_pylist()
    if len({label for label in labels if label is not None}) < 2:
        return frozenset()
    method = LabelMethod(labels, index.image_places, index.n_places)
    rows = LatentActivations(sae, np.arange(sae.n_latents), index.by_latent)
    found = method.candidates(rows, 1).word[:, 0]
    return frozenset(np.flatnonzero(found >= 0).tolist())
