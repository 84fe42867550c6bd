"""Tiny CLIPs of the three libraries' classes, with weights that all matter."""

from __future__ import annotations

from typing import Any

import torch

OPEN_CLIP = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}


def shake(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every weight away from where it was initialised, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def open_clip_module(open_clip: Any, **changes: Any) -> Any:
    """open_clip's own CLIP; `quick_gelu` and others as `changes`."""
    return shake(open_clip.model.CLIP(**{**OPEN_CLIP, **changes})).eval()
