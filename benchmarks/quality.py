"""How good an SAE of the calibration CLIP becomes, and the sweep that chose the demo's k.

    python benchmarks/quality.py [--k 16 32 48 64] [--out FILE]

It trains on the last block, all tokens, with the demo's settings and every k, and measures on
scenes of another world. Baselines (untrained SAE, PCA and raw neurons at the same L0) follow the
demo's k.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tables import RESULTS, keep

import sparsight as sp
from sparsight.demo import DemoConfig, train_config


@dataclass(frozen=True)
class Options:
    """Sweep k; write the table."""

    k: tuple[int, ...] = (16, 32, 48, 64)
    """Active latents per vector."""

    site: str = "blocks.-1.resid_post"
    """Where to read the calibration CLIP."""

    out: Path = RESULTS
    """File that keeps the table."""


def main(options: Options) -> None:
    demo, rows = DemoConfig(), []
    model = sp.load_model("calibration")
    with tempfile.TemporaryDirectory() as folder:
        store, test = (
            sp.extract(
                model,
                sp.open_images(f"calibration:{n}:{seed}"),
                sites=[options.site],
                out=Path(folder) / f"store-{seed}",
            )
            for seed, n in enumerate((demo.n_images, demo.n_test))
        )
        for k in options.k:
            config = train_config(dataclasses.replace(demo, k=k))
            run = sp.train(store, config, out=Path(folder) / f"k-{k}")
            report = sp.evaluate(run.sae(), test, model=model, baselines=k == demo.k)
            rows.append(row(f"k {k}", report.metrics, report.metrics))
            for name, figures in report.metrics.get("baselines", {}).items():
                rows.append(row(f"k {k}: {name}", figures, report.metrics))
    title = (
        f"Calibration CLIP, {options.site}, {demo.n_latents:,} latents, {demo.n_vectors:,} vectors "
        f"of {demo.n_images:,} scenes, measured on {demo.n_test:,} others"
    )
    keep(title, rows, options.out, name="quality")


def row(name: str, figures: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Make one row of the table."""
    shot = figures["zero_shot"]["reconstructed"]["top1"] - whole["zero_shot"]["original"]["top1"]
    symbols = figures["truth_summary"]["symbol"]
    return {
        "": name,
        "FVU": figures["fvu"],
        "dead": f"{100 * figures['dead']:.2f} %" if "dead" in figures else "–",
        "zero-shot, points": f"{100 * shot:+.1f}",
        "symbols: AUC": symbols["auc"]["mean"],
        "symbols: IoU": symbols["iou"]["mean"],
        "words: AUC": figures["truth_summary"]["word"]["auc"]["mean"],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
