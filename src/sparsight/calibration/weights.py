"""Where the trained calibration CLIP lies: a folder in the format of `transformers`."""

from __future__ import annotations

from pathlib import Path

CLIP_FOLDER = Path(__file__).parent / "clip"
