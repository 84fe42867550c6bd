"""Find latents by number, or by their names and labels in the index."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from sparsight.errors import UserError
from sparsight.latents import LatentIndex

MOST = 3
"""Largest number of latents that one word may stand for."""


def find_latents(
    words: Sequence[str | int], n_latents: int, index: LatentIndex | None = None
) -> dict[int, str | None]:
    """Return the latents that are meant, with their names.

    Args:
        words: numbers; or words that occur in a latent's name, or else in the label of most of its
            top-activating images. If several match, those with the best names, or the largest share
            of the label, come first.
        n_latents: number of latents of the SAE.
        index: index of the SAE; needed for words.

    Raises:
        UserError: a number is out of range, or no latent has such a name.
    """
    found: dict[int, str | None] = {}
    for word in words:
        text = str(word).strip()
        if not text:
            raise UserError("A latent is empty text. Give its number, or a word of its name.")
        if re.fullmatch("-?[0-9]{1,18}", text):
            latent = int(text)
            if not 0 <= latent < n_latents:
                raise UserError(f"The SAE has no latent {latent}; it has 0 to {n_latents - 1}.")
            found.setdefault(latent, None if index is None else _name(index, latent))
            continue
        if index is None:
            raise UserError(
                f"{text!r} is not a number, and there is no index with names to search. Build one "
                "with `sparsight index`, or give the latent's number."
            )
        for latent in _called(text, index):
            found.setdefault(latent, _name(index, latent))
    return found


def _called(text: str, index: LatentIndex) -> list[int]:
    rows = index.table.select(
        ["latent", "name", "name_score", "top_label", "top_label_share", "density"]
    ).to_pylist()
    wanted = text.casefold()

    def matches(column: str, score: str) -> list[int]:
        hits = [row for row in rows if wanted in (row[column] or "").casefold()]
        exact = [row for row in hits if (row[column] or "").casefold() == wanted]
        hits = sorted(exact or hits, key=lambda row: -(row[score] or 0.0))
        return [row["latent"] for row in hits[:MOST]]

    found = matches("name", "name_score") or matches("top_label", "top_label_share")
    if found:
        return found
    known = sorted({row[key] for row in rows for key in ("name", "top_label") if row[key]})
    close = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{index.folder}: no latent is named {text!r}.{hint}")


def _name(index: LatentIndex, latent: int) -> str | None:
    row = index.row(latent)
    name: str | None = row["name"] or row["top_label"]
    return name
