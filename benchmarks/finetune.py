"""What fine-tuning against typographic attacks wins back, and costs: the table `finetune` in
QUALITY.md.

The calibration CLIP is fine-tuned in several ways and measured on scenes of other seeds, on which
the CLIP itself was measured. The last rows are from the exported folder, loaded by
`transformers.CLIPModel.from_pretrained` alone.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tables import QUALITY, keep
from transformers import AutoTokenizer, CLIPModel

import sparsight as sp
from sparsight.attacks import make_pairs
from sparsight.calibration import CLIP_FOLDER
from sparsight.calibration.clip import zero_shot_figures
from sparsight.finetuning import NeuronScaling, Rates
from sparsight.finetuning.measures import compare
from sparsight.finetuning.subjects import Subjects


@dataclass(frozen=True)
class Options:
    """Fine-tune in each way; write the table."""

    data: str = "calibration:1200:41"
    """Clean scenes; scenes with a word on them are left out."""

    attacked: str = "calibration:1000:42:single"
    """Scenes to write words on."""

    measure: str = "calibration:512:990000:single"
    """Scenes to measure on."""

    images: str = "calibration:500:44"
    """Scenes of all kinds for N-way zero-shot accuracy."""

    only: tuple[str, ...] = ()
    """Names of the variants; default: all."""

    workers: int = 0
    """Processes that draw scenes."""

    folder: Path | None = None
    """Folder that keeps the runs, so that a second call continues; default: none are kept."""

    out: Path = QUALITY
    """File that keeps the table."""


SHORT = sp.FinetuneConfig()
HIS = dataclasses.replace(
    SHORT, loss="similarity_of_similarities", smoothing=0.1, distillation=0.0, pull=0.0
)

WAYS: dict[str, sp.FinetuneConfig] = {
    "InfoNCE, distillation, pull": SHORT,
    "the same, geometric": dataclasses.replace(SHORT, parametrisation="geometric"),
    "without pull": dataclasses.replace(SHORT, pull=0.0),
    "vision tower alone": dataclasses.replace(SHORT, rates=Rates(text_blocks=0, token_embedding=0)),
    "with scaled neurons (× 10)": dataclasses.replace(SHORT, scaling=NeuronScaling(10.0)),
    "similarity of similarities": HIS,
}


def row(name: str, found: Mapping[str, Any], minutes: float) -> dict[str, Any]:
    """Make a row of the table."""
    after = {kind: each["after"]["accuracy"] for kind, each in found["attack"].items()}
    return {
        "": name,
        "attacked": percent(after["attacked"]),
        "won back": f"{100 * found['won_back']:.0f} %",
        "clean": percent(after["clean"]),
        "change": points(found["attack"]["clean"]["change"]["value"]),
        "own name": percent(after["same"]),
        "nonsense": percent(after["control"]),
        "other scenes": percent(found["zero_shot"]["after"]["top1"]),
        "minutes": f"{minutes:.1f}",
    }


def before_row(found: Mapping[str, Any]) -> dict[str, Any]:
    """Make the row of the unchanged model."""
    before = {kind: each["before"]["accuracy"] for kind, each in found["attack"].items()}
    return {
        "": "as it is",
        "attacked": percent(before["attacked"]),
        "won back": "",
        "clean": percent(before["clean"]),
        "change": "",
        "own name": percent(before["same"]),
        "nonsense": percent(before["control"]),
        "other scenes": percent(found["zero_shot"]["before"]["top1"]),
        "minutes": "",
    }


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def plain_row(name: str, folder: Path) -> dict[str, Any]:
    """Make a row with `transformers` alone, by the calibration CLIP's own protocol."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures = zero_shot_figures(CLIPModel.from_pretrained(folder).eval(), tokenizer)
    return {
        "": f"{name}, by transformers",
        "attacked": percent(figures["attacked"]),
        "clean": percent(figures["clean"]),
    }


def main(options: Options) -> None:
    """Tune, measure, write."""
    model = sp.load_model("calibration", device="cpu")
    scenes = sp.open_images(options.data)
    data = scenes.select([i for i in range(len(scenes)) if scenes.scene(i).writing is None])
    attacks = make_pairs(sp.open_images(options.attacked), seed=0)
    pairs = make_pairs(sp.open_images(options.measure), seed=1)
    subjects = Subjects(pairs, images=sp.open_images(options.images), workers=options.workers)
    rows: list[dict[str, Any]] = []
    tuned: Path | None = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name, config in WAYS.items():
            if options.only and name not in options.only:
                continue
            place = folder / name.replace(" ", "-").replace(",", "")
            started = time.monotonic()
            run = sp.finetune(model, data, config, place, attack=attacks, workers=options.workers)
            lines = run.metrics()
            steps = [line["step"] for line in lines]
            spent = sum(
                line["seconds_per_step"] * (step - previous)
                for line, step, previous in zip(lines, steps, [0, *steps], strict=False)
            )
            found = compare(model, run.model("cpu"), subjects)
            if not rows:
                rows.append(before_row(found))
                tuned = run.folder
            rows.append(row(name, found, spent / 60))
            print(rows[-1], f"{time.monotonic() - started:.0f} s", flush=True)
        rows.append(plain_row("as it is", CLIP_FOLDER))
        if tuned is not None:
            rows.append(plain_row(rows[1][""], tuned))
        columns = list(rows[0])
        n = len(pairs)
        keep(
            f"Fine-tuning the calibration CLIP against words: {n} scenes, 66 classes; "
            f"{SHORT.batch_size} pairs a step, half of them attacked, one pass over "
            f"{len(data)} clean scenes",
            [{column: each.get(column, "") for column in columns} for each in rows],
            options.out,
            name="finetune",
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
