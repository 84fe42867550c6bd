"""The kinds of things that latents stand for."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Kinds = npt.NDArray[Any]
"""One kind per latent, as text."""

KINDS = ("colour", "texture", "part", "object", "scene", "text", "position", "none")
"""All kinds, in the order of tables. "texture" includes patterns."""

TRUTH_KINDS = {
    "symbol": "object",
    "object_colour": "colour",
    "background": "colour",
    "pattern": "texture",
    "word": "text",
}
"""The kind of each attribute of the calibration world; the background is a colour there."""
