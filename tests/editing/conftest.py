from __future__ import annotations

from model_fixtures import calibration, clip, pixels, tiny

__all__ = ["calibration", "clip", "pixels", "tiny"]
