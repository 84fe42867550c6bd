"""Let a torchvision that was built for CUDA import beside a torch for the CPU.

Its kernels do not load there, and it fails at import for want of their names; open_clip imports it
and uses none of them. Import this before transformers and open_clip. Where torchvision works, or
is not there, this does nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

OPERATORS = """
nms qnms roi_align qroi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool
_roi_pool_backward ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward
"""
KEPT_ALIVE: list[torch.library.Library] = []


def _imports() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


if importlib.util.find_spec("torchvision") is not None and not _imports():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS.split():
        library.define(f"{operator}(Tensor x) -> Tensor")
    KEPT_ALIVE.append(library)
