"""Make the calibration CLIP again: `python -m tools.calibration_clip.train`, from a clone."""
