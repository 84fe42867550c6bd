"""The page that compares before and after: one self-contained HTML file."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markupsafe import Markup
from matplotlib.figure import Figure

from sparsight.errors import SparsightError, UserError
from sparsight.figures import (
    NOT_MEASURED,
    dig,
    interval,
    percent,
)
from sparsight.files import read_json, write_json, write_text
from sparsight.finetuning import plots
from sparsight.finetuning.config import FinetuneRecipe
from sparsight.finetuning.measures import compare
from sparsight.finetuning.run import FinetuneRun
from sparsight.finetuning.subjects import Subjects
from sparsight.finetuning.tables import LINES, tables
from sparsight.pages.data_uris import encode_picture, is_crisp
from sparsight.pages.style import to_svg
from sparsight.pages.tables import Plot
from sparsight.pages.template import made_with, page_css, template
from sparsight.redaction import without_folders
from sparsight.training.run import CONFIG
from sparsight.vision import VisionModel

FIGURES, PAGE = "before-after.json", "report.html"
FORMAT_VERSION = 1
PICTURE_SIDE = 160

VERDICTS = {"right": "right", "word": "fooled by the word", "other": "something else"}
GLOSSARY: dict[str, str] = {
    "accuracy": "Share of images whose own class scores highest among all classes, each written "
    "into a sentence. Intervals are 95 % Wilson intervals; those of changes are paired: "
    "the same images before and after.",
    "fooled": "Share of images on which the class of the attacking word wins. On images without "
    "that word, this is chance.",
    "won back": "Accuracy on attacked images that fine-tuning recovered, as a share of what "
    "words cost before.",
    "in-batch accuracy": "zer0int's figure for ImageNet and ObjectNet: an "
    "image is compared only with the bare names of the labels in its own batch, without "
    "normalised embeddings. Far easier than N-way zero-shot, and not comparable with it.",
    "zero-shot": "Accuracy among all classes on images other than the attacked ones.",
    "recall": "Share of queries with a matching caption or image among the top 1 or 5. Equal "
    "captions count as matches.",
    "modality gap": "Distance between the mean unit embedding of images and that of captions.",
    "separability": "Share of held-out embeddings whose modality a linear discriminant predicts "
    "correctly. 50 % is chance: no gap.",
    "text-salient": "Latents that are more active on images with another class's name on them than "
    "on the same images without it, by a paired permutation test that holds the false discovery "
    "rate.",
    "drift": "Correlation of a latent's activation before and after, over the same images. "
    "Matched: with the latent that fits it best, one to one.",
    "AUC": "How well the single best latent separates images with an attribute from those without; "
    "chosen on half of the images, scored on the rest. 0.5 is chance.",
}


@dataclass(frozen=True)
class Change:
    """A headline figure before and after."""

    name: str
    term: str
    before: str
    after: str
    note: str = ""


def report_finetuning(
    run: FinetuneRun | str | Path,
    before: VisionModel,
    subjects: Subjects,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure a finished run before and after, and write `before-after.json` and `report.html`.

    Args:
        run: the finished run, or its folder.
        before: the model that it started from.
        subjects: what both are measured on: images that the run was not trained on.
        quiet: show no progress lines.

    Returns:
        The figures; see `compare`.

    Raises:
        UserError: the run has not finished, or the SAE is not of the original model.
    """
    run = run if isinstance(run, FinetuneRun) else FinetuneRun(Path(run))
    # Both models see the same pixels.
    after = run.model(str(before.device), scale_jpegs=before.min_side is not None)
    found = compare(before, after, subjects, quiet=quiet)
    write_json(run.out / FIGURES, {"format_version": FORMAT_VERSION, **found})
    write_page(run, found, subjects)
    return found


def read_figures(run: FinetuneRun) -> dict[str, Any]:
    """Read the figures that `report_finetuning` wrote.

    Raises:
        UserError: they do not exist, or are of another version.
    """
    found = read_json(run.out / FIGURES)
    if found.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(f"{run.out / FIGURES}: is of another version; measure again.")
    return found


def write_page(run: FinetuneRun, found: Mapping[str, Any], subjects: Subjects) -> Path:
    """Write the page about measured figures.

    Returns:
        The path of the page.
    """
    recipe, log = run.recipe, run.metrics()
    text = template("finetuning.html.jinja").render(
        title=f"{without_folders(recipe.model)}, before and after",
        facts=_facts(recipe, log, found),
        lead=lead(found),
        tiles=_tiles(found),
        plots=_plots(found),
        examples=_examples(found, subjects),
        verdicts=VERDICTS,
        tables=tables(found),
        omitted=_omitted(found),
        training=_training(log),
        config=without_folders((run.out / CONFIG).read_text(encoding="utf-8")),
        glossary=GLOSSARY,
        not_measured=NOT_MEASURED,
        css=page_css(),
    )
    write_text(run.out / PAGE, text)
    return run.out / PAGE


def lead(found: Mapping[str, Any]) -> str:
    """Say what happened, in two sentences."""
    attack = found["attack"]
    clean, attacked = (attack[kind] for kind in ("clean", "attacked"))
    cost = 100 * found["words_cost"]
    first = (
        f"Another class's name on an image cost this model {cost:.1f} points of accuracy: "
        f"{percent(clean['before']['accuracy'])} without, "
        f"{percent(attacked['before']['accuracy'])} with it."
    )
    if found["won_back"] is None:
        return f"{first} There was no loss to win back."
    change = 100 * clean["change"]["value"]
    moved = (
        "left accuracy on clean images unchanged"
        if abs(change) < 0.05
        else (f"{'cost' if change < 0 else 'gained'} {abs(change):.1f} points on clean images")
    )
    return (
        f"{first} Fine-tuning won back {100 * found['won_back']:.0f} % of that "
        f"({percent(attacked['after']['accuracy'])} after) and {moved}."
    )


def _facts(
    recipe: FinetuneRecipe, log: list[dict[str, Any]], found: Mapping[str, Any]
) -> list[tuple[str, str]]:
    config = recipe.train
    steps = log[-1]["step"] if log else 0
    loss = "InfoNCE" if config.loss == "info_nce" else config.loss.replace("_", " ")
    seconds = sum(
        line["seconds_per_step"] * (line["step"] - previous)
        for line, previous in zip(log, [0, *(line["step"] for line in log)], strict=False)
    )
    batch = f"{config.batch_size:,}"
    if config.accumulation > 1:
        batch += f" × {config.accumulation}"
    facts = [
        ("Trained on", _source(recipe.data)),
        ("Attacks", _source(recipe.attack or "none")),
        ("Measured on", f"{found['n']:,} images, {found['n_classes']:,} classes"),
        *([("Did not load", _lost(log, found))] if _lost(log, found) else []),
        ("Steps", f"{steps:,} of {batch} pairs"),
        ("Loss", loss),
        ("Optimiser", {"adamw": "AdamW", "adabelief": "AdaBelief"}[config.optimiser]),
        ("Parametrisation", config.parametrisation),
        ("Time", f"{seconds / 60:.1f} minutes"),
        ("Date", f"{datetime.datetime.now(datetime.UTC):%-d %B %Y, %H:%M} UTC"),
        ("Made with", made_with()),
        ("Seed", str(config.seed)),
    ]
    return facts


def _lost(log: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """Say how many images were left out, in training and in measuring."""
    trained = log[-1].get("failed", 0) if log else 0
    parts = [
        f"{count:,} {what}"
        for count, what in (
            (trained, "training images"),
            (max(found["failed"].values(), default=0), "test images"),
        )
        if count
    ]
    return " and ".join(parts)


def _tiles(found: Mapping[str, Any]) -> list[Change]:
    attack = found["attack"]
    made = [
        Change(
            name,
            "accuracy",
            percent(attack[kind]["before"]["accuracy"]),
            percent(attack[kind]["after"]["accuracy"]),
            interval(attack[kind]["after"]),
        )
        for kind, name in (("attacked", "Attacked images"), ("clean", "Clean images"))
    ]
    if found["won_back"] is not None:
        made.append(
            Change("Loss won back", "won back", "", f"{100 * found['won_back']:.0f} %",
                   _won(found))
        )  # fmt: skip
    shown = dig(found, "attack.attacked")
    made.append(
        Change(
            "Fooled by the word",
            "fooled",
            percent(shown["before"]["fooled"]),
            percent(shown["after"]["fooled"]),
        )
    )
    for name, path, show in LINES[:1] + LINES[4:5]:
        values = [dig(found, path.replace("*", side)) for side in ("before", "after")]
        if values[0] is not None:
            term = "zero-shot" if path.startswith("zero") else "modality gap"
            made.append(Change(name[0].upper() + name[1:], term, *map(show, values)))
    return made


def _won(found: Mapping[str, Any]) -> str:
    note = f"of {100 * found['words_cost']:.1f} points"
    if found["won_back_interval"] is None:
        return note
    low, high = found["won_back_interval"]
    return f"{note}; {100 * low:.0f} to {100 * high:.0f} %"


def _omitted(found: Mapping[str, Any]) -> list[str]:
    notes = []
    if "zero_shot" not in found:
        notes.append(
            "N-way zero-shot on other images: not measured; no labelled images were given."
        )
    if "retrieval" not in found:
        notes.append(
            "Retrieval and modality gap: not measured; no images with captions were given."
        )
    if "latents" not in found:
        notes.append("Latents: not measured; no SAE of the original model was given.")
    elif "truth" not in found["latents"]:
        notes.append(
            "Known attributes: not measured; they need about forty images of the calibration world."
        )
    elif "matched" not in found["latents"]["drift"]:
        notes.append(f"Matched latents: {found['latents']['drift'].get('omitted')}")
    return notes


def _plots(found: Mapping[str, Any]) -> list[Plot]:
    drawn = [
        (
            "accuracy",
            "Accuracy by word",
            "The same images with another class's name, their own, nonsense or nothing on them.",
            plots.accuracy_bars(found["attack"]),
        )
    ]
    latents = dig(found, "latents.latents")
    if latents:
        text = "The latents that responded most to class names before; one SAE reads both models."
        drawn.append(("latents", "Text-salient latents", text, plots.latent_effects(latents)))
    return [_drawn(*each) for each in drawn]


def _training(log: list[dict[str, Any]]) -> list[Plot]:
    if not log:
        return []
    drawn = [
        ("loss", "Loss", "Means since the previous line of the log; the parts are unweighted.",
         plots.loss_curves(log)),
        ("gradients", "Gradient norms by layer", "Before clipping.", plots.gradient_norms(log)),
        ("learning", "Rate, scale, gradient", "", plots.learning(log)),
    ]  # fmt: skip
    return [_drawn(*each) for each in drawn]


def _drawn(name: str, title: str, text: str, drawn: Figure) -> Plot:
    return Plot(title, text, Markup(to_svg(drawn, name, title)))


def _examples(found: Mapping[str, Any], subjects: Subjects) -> list[dict[str, Any]]:
    made = []
    for each in found["examples"]:
        try:
            image = subjects.pairs.attacked.load(each["index"])
        except SparsightError:  # the images were there for the measurement
            continue
        uri = encode_picture(image, PICTURE_SIDE)
        made.append({**each, "picture": uri, "crisp": is_crisp(image)})
    return made


def _source(spec: str) -> str:
    """Name the source of images for people: without folders and long selections."""
    whole, _, selection = without_folders(unquote(spec)).partition("[")
    shown = f" [{selection}" if 0 < len(selection) < 24 else " (a selection)" if selection else ""
    return whole + shown
