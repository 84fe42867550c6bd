"""SAEs that others have published: a table, `pretrained.toml`, and how to look things up in it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsight.errors import UserError

TABLE = Path(__file__).with_name("pretrained.toml")

OTHER = "other"
"""The format of what Sparsight does not read."""


@dataclass(frozen=True)
class Published:
    """An SAE, or some that differ in what stands in braces, on the Hub."""

    id: str
    """What `SparseAutoencoder.from_pretrained` takes."""

    model: str
    """What it reads; an id that `load_model` takes where one is known."""

    format: str
    """A format's name; "other" if Sparsight does not read it."""

    source: str
    """Where the row is from."""

    site: str | None = None
    """Where in the model."""

    tokens: str | None = None
    """At which positions."""

    latents: int | None = None
    """How many."""

    k: int | None = None
    """Active latents per vector, where that is fixed."""

    licence: str | None = None
    """As the Hub says."""

    note: str | None = None
    """What else one must know."""


@cache
def published() -> tuple[Published, ...]:
    """All rows of the table."""
    with TABLE.open("rb") as file:
        return tuple(Published(**row) for row in tomllib.load(file)["sae"])


def look_up(
    *, model: str | None = None, site: str | None = None, format: str | None = None
) -> list[Published]:
    """Rows of the table, in its order.

    Args:
        model: a part of the model's name; upper and lower case are the same.
        site: a part of the site's name: "embedding", "blocks.9.", "resid_post".
        format: the name of a format.

    Raises:
        UserError: there is no such row; the message tells what there is.
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
