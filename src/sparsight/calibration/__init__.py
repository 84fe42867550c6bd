"""The embedded world: rendered scenes with known ground truth, and the small CLIP trained on them.

Builds on Pillow, NumPy and matplotlib's fonts; `train` needs torch and transformers as well.
Start with `CalibrationWorld`; `python -m tools.calibration_clip.train` trains the CLIP again.
"""

from sparsight.calibration.symbols import COLOURS, PATTERNS, SYMBOLS
from sparsight.calibration.weights import CLIP_FOLDER
from sparsight.calibration.world import (
    ATTRIBUTES,
    IMAGE_SIZE,
    PATCH_GRID,
    PATCH_SIZE,
    CalibrationWorld,
    RenderedScene,
    Scene,
    SceneObject,
    WorldConfig,
    Writing,
    write_on,
)

__all__ = [
    "ATTRIBUTES",
    "CLIP_FOLDER",
    "COLOURS",
    "IMAGE_SIZE",
    "PATCH_GRID",
    "PATCH_SIZE",
    "PATTERNS",
    "SYMBOLS",
    "CalibrationWorld",
    "RenderedScene",
    "Scene",
    "SceneObject",
    "WorldConfig",
    "Writing",
    "write_on",
]
