"""Constants of the run that the tests push."""

from __future__ import annotations

SITES = ("blocks.2.resid_post", "blocks.3.resid_post")
EVIL = "<script>alert(1)</script> | `sun`"
METRICS = {
    "fvu": 0.125,
    "l0": 7.75,
    "dead": 0.25,
    "dead_window": 3200,
    "n_vectors": 4160,
    "images": "calibration:64:5",
    "trained_on_these": True,
    "zero_shot": {
        "original": {"top1": 0.8, "n": 64, "n_classes": 5, "interval": [0.7, 0.9]},
        "reconstructed": {"top1": 0.6, "n": 64, "n_classes": 5, "interval": [0.475, 0.7]},
    },
    "truth": {"symbol/sun": {"latent": 3, "auc": 0.93, "f1": 0.5, "iou": 0.25}},
    "baselines": {"untrained": {"fvu": 0.875, "l0": 8.0}, "pca": {"fvu": 0.375, "l0": 8.0}},
    "omitted": {},
}
"""Figures as `evaluate` writes them."""
