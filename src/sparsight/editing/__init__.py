"""Act on a model: switch latents off, find what fools it, fine-tune it, hand it back.

Builds on `vision`, `sae` and `latents`.
"""

from __future__ import annotations
