"""SAEs that others have published: a table, `pretrained.toml`, and how to search it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsight.errors import UserError

TABLE = Path(__file__).with_name("pretrained.toml")

OTHER = "other"
"""The format of what Sparsight cannot read."""


@dataclass(frozen=True)
class Published:
    """One SAE on the Hub, or several that differ in what stands in braces."""

    id: str
    """What `SparseAutoencoder.from_pretrained` takes."""

    model: str
    """The model that it reads; an id for `load_model` if one is known."""

    format: str
    """The name of its format; "other" if Sparsight cannot read it."""

    source: str
    """The source of the row."""

    site: str | None = None
    """The site in the model."""

    tokens: str | None = None
    """The positions that it reads."""

    latents: int | None = None
    """The number of latents."""

    k: int | None = None
    """The number of active latents per vector, if it is fixed."""

    licence: str | None = None
    """The licence, as the Hub gives it."""

    note: str | None = None
    """What else a user must know."""


@cache
def published() -> tuple[Published, ...]:
    """Return all rows of the table."""
    with TABLE.open("rb") as file:
        return tuple(Published(**row) for row in tomllib.load(file)["sae"])


def look_up(
    *, model: str | None = None, site: str | None = None, format: str | None = None
) -> list[Published]:
    """Return the rows of the table that match, in its order.

    Args:
        model: a part of the model's name; case is ignored.
        site: a part of the site's name: "embedding", "blocks.9.", "resid_post".
        format: the name of a format.

    Raises:
        UserError: no row matches; the message says what there is.
    """
    rows = list(published())
    for name, wanted in (("model", model), ("site", site), ("format", format)):
        if wanted is None:
            continue
        here = [getattr(row, name) for row in rows]
        exact = name == "format"
        kept = [
            row
            for row, value in zip(rows, here, strict=True)
            if value is not None and (wanted == value if exact else wanted.lower() in value.lower())
        ]
        if not kept:
            known = list(dict.fromkeys(value for value in here if value is not None))
            shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
            raise UserError(f"No published SAE has the {name} {wanted!r}; there is {shown}.")
        rows = kept
    return rows
