"""Runs on the Hugging Face Hub: a model card that says what they are worth, and the upload.

Builds on `latents`, whose run files, scores and pictures the card shows, and on the plain card of
`sae`. Start at `push_to_hub` (push.py); `hub` uploads, and puts what can go wrong into words.
"""

from __future__ import annotations

from sparsight.publishing.push import Push, push_to_hub

__all__ = ["Push", "push_to_hub"]
