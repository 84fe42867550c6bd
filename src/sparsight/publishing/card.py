"""The model card of a run: the plain one, with its figures, some latents and how it was trained."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sparsight
from sparsight.figures import NOT_MEASURED, count, dig, percent, rounded, shown_in
from sparsight.latents.cards import TOP_SHOWN
from sparsight.latents.run_files import RunFiles
from sparsight.pages import scores
from sparsight.pages.tables import Table
from sparsight.publishing.pictures import LatentPicture, LatentPictures
from sparsight.redaction import without_folders
from sparsight.sae.card import ModelCard, escape, fenced, model_card, number, table

HUB = "https://huggingface.co"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def card_of(
    run: RunFiles,
    place: str,
    pictures: LatentPictures | None,
    *,
    revision: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Make the card of one SAE.

    Args:
        run: the SAE and the files around it.
        place: what `from_pretrained` will take.
        pictures: drawings of some latents.
        revision: branch of the Hub's repository, if not the default one.
        license: the licence, as the Hub spells it.
    """
    plain = model_card(run.sae, place)
    rows = dict(plain.rows)
    if hub_id := _hub_id(run):
        revision_of = run.model.get("revision")
        rows["model"] = f"[{escape(hub_id)}]({HUB}/{hub_id})"
        rows["model"] += f", revision {escape(str(revision_of)[:10])}" if revision_of else ""
    rows["made with"] = "Sparsight " + escape(
        str(run.sae.metadata.get("sparsight_version", sparsight.__version__))
    )
    sections = [
        ("Figures", _figures(run.metrics)),
        ("Latents", _latents(run, pictures)),
        ("Training", _training(run)),
    ]
    return dataclasses.replace(
        plain,
        rows=list(rows.items()),
        usage=_usage(run, place, revision) or plain.usage,
        header=header([run], license),
        sections=sections,
    )


def index_card(
    runs: Mapping[str, RunFiles],
    repo_id: str,
    *,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """Make the README at the root of a repository with several SAEs.

    Args:
        runs: the runs, by their folders in the repository.
        repo_id: id of the repository.
        revision: its branch, if not the default one.
        license: the licence, as the Hub spells it.
    """
    first_place, first = next(iter(runs.items()))
    ids = list(dict.fromkeys(without_folders(str(run.model.get("id"))) for run in runs.values()))
    usage = _usage(first, f"{repo_id}/{first_place}", revision)
    plain = model_card(first.sae, f"{repo_id}/{first_place}")
    head = ("folder", "site", "latents", "sparsity", *(each.name for each in shown_in("log")))
    lines = [
        (
            f"[{escape(place)}]({place}/README.md)",
            escape(run.site),
            number(run.sae.n_latents),
            escape(run.sae.config.sparsity.describe()),
            *(each.show(each.of(run.metrics)) for each in shown_in("log")),
        )
        for place, run in runs.items()
    ]
    card = dataclasses.replace(
        plain,
        title=f"{len(runs)} sparse autoencoders for {', '.join(ids)}",
        rows=[("model", ", ".join(map(escape, ids))), ("autoencoders", str(len(runs)))],
        usage=usage or plain.usage,
        header=header(list(runs.values()), license),
        sections=[
            (
                "Autoencoders",
                table(head, lines) + "\n\nEach folder has a card of its own: what was measured, "
                "how it was trained, and what some of its latents respond to.",
            )
        ],
    )
    return card.text()


def header(runs: Sequence[RunFiles], license: str | None) -> dict[str, str | Sequence[str]]:
    """Return what the card's header says in addition to the library and the tags."""
    models = dict.fromkeys(filter(None, map(_hub_id, runs)))
    specs = [str(run.sae.metadata.get("images") or "") for run in runs]
    sets = dict.fromkeys(filter(None, map(_hub_dataset, specs)))
    header: dict[str, str | Sequence[str]] = {}
    if license:
        header["license"] = license
    return header | {"base_model": list(models), "datasets": list(sets)}


def _hub_id(run: RunFiles) -> str | None:
    """Return the model's id on the Hub; None if it is not from there."""
    id = str(run.model.get("id", ""))
    return id if _HUB_ID.fullmatch(id) else None


def _hub_dataset(spec: str) -> str | None:
    name = spec.removeprefix("hf:").partition("[")[0].partition(":")[0]
    return name if spec.startswith("hf:") and re.fullmatch(r"[\w-][\w./-]*", name) else None


def _usage(run: RunFiles, place: str, revision: str | None) -> str | None:
    """Return code from images to sparse codes; None if others cannot load the model."""
    model = run.model
    id = str(model.get("id", ""))
    if not (id == "calibration" or _hub_id(run) or re.fullmatch(r"open_clip:[\w./-]+", id)):
        return None
    if run.site == "unknown" or run.tokens == "unknown" or without_folders(id) != id:
        return None
    options = [json.dumps(id)]
    if model.get("revision") and _hub_id(run):
        options.append(f"revision={json.dumps(model['revision'])}")
    if model.get("dtype") not in (None, "float32"):
        options.append(f"dtype={json.dumps(model['dtype'])}")
    scaled = "jpeg_min_side" in (model.get("preprocessing") or {})
    options += ["scale_jpegs=True"] * scaled
    place_and_size = "i, model.min_side" if scaled else "i"
    source = json.dumps(place) + (f", revision={json.dumps(revision)}" if revision else "")
    site, tokens = json.dumps(run.site), json.dumps(run.tokens)
    result = "x_hat = sae.decode(code)"
    if run.sae.is_transcoder:
        target = run.sae.metadata.get("target_site", "the target site")
        result = f"y_hat = sae.decode(code)           # what {target} is predicted to be"
    return f"""import torch
import sparsight as sp

sae = sp.SparseAutoencoder.from_pretrained({source})
model = sp.load_model({", ".join(options)})
images = sp.open_images("calibration:8")   # rendered scenes; or your own: "photos/"
pixels = torch.stack([model.transform(images.load({place_and_size})) for i in range(len(images))])
x = model.read(pixels, {site}, {tokens})[{site}]
x = x.flatten(0, 1).float().cpu()  # [vectors, {run.sae.d_in}]
code = sae.encode(x)               # which latents are active, and how strongly
{result}"""


def _figures(metrics: Mapping[str, Any]) -> str:
    if "fvu" not in metrics:
        return "Not measured. `sparsight evaluate` measures, and the next push shows it."
    parts = []
    if images := metrics.get("images"):
        parts.append(f"On {escape(without_folders(str(images)))}.")
    if kept := _kept(metrics):
        parts.append(kept)
    for make in (scores.reconstruction_table, scores.downstream_table, scores.truth_table):
        if (table_of_scores := make(metrics)) is not None:
            parts.append(_score_table(table_of_scores))
    if window := metrics.get("dead_window"):
        parts.append(f"Dead: never active in the last {count(window)} vectors.")
    gaps = scores.not_measured(metrics)
    parts += ["\n".join(f"- {escape(without_folders(gap))}" for gap in gaps)] if gaps else []
    return "\n\n".join(parts)


def _kept(metrics: Mapping[str, Any]) -> str:
    """Say in a sentence how much zero-shot accuracy the reconstruction leaves."""
    shot = metrics.get("zero_shot") or {}
    before, after = dig(shot, "original.top1"), dig(shot, "reconstructed.top1")
    if not before or after is None:
        return ""
    return (
        f"Zero-shot accuracy with this site reconstructed: {percent(after)}, which is "
        f"{percent(after / before)} of the model's own {percent(before)}."
    )


def _score_table(scored: Table) -> str:
    rows = []
    for row in scored.rows:
        name = escape(f"{row.group}: {row.name}" if row.group else row.name)
        cells = ["–" if cell == NOT_MEASURED else escape(cell) for cell in row.cells]
        rows.append([name, *cells])
    text = f"### {scored.title}\n\n" + table(["", *map(escape, scored.columns)], rows)
    return text + (f"\n\n{escape(scored.note)}" if scored.note else "")


def _latents(run: RunFiles, pictures: LatentPictures | None) -> str:
    if run.index is None:
        return (
            "Not shown: there is no index of what they respond to. `sparsight index` builds one, "
            "and the next push shows some latents."
        )
    if pictures is None:
        return "None is shown."
    if not pictures.pictures:
        return f"None is shown: no latent is active on {TOP_SHOWN} images or more."
    images = run.index.manifest["images"]
    parts = [
        f"Of {count(images['n_images'])} images "
        f"({escape(without_folders(images['source']))}), "
        f"the {TOP_SHOWN} that activate a latent most, the strongest first."
        + (
            " Below them the same, dark where the latent is not active."
            if any(picture.heatmaps for picture in pictures.pictures)
            else ""
        ),
        f"Latents: {escape(pictures.how_chosen)}",
    ]
    parts += [_latent(picture) for picture in pictures.pictures]
    notes = list(dict.fromkeys(escape(without_folders(note)) for note in pictures.notes))
    if notes:
        parts.append(notes[0] + (f" ({len(notes) - 1} more of this kind.)" if notes[1:] else ""))
    return "\n\n".join(parts)


def _latent(picture: LatentPicture) -> str:
    row = picture.row
    facts = [
        f"active on {percent(row['density'])} of the vectors, in "
        f"{count(row['n_active_images'])} images",
        f"strongest {rounded(row['max_activation'])}",
    ]
    name = f"latent {row['latent']}"
    if row["name"] is not None:
        facts.insert(0, name)
        name = escape(row["name"])
        if row["name_score"] is not None:
            facts.insert(1, f"score of the name {rounded(row['name_score'])}")
    if row["top_label"] is not None:
        share = percent(row["top_label_share"])
        facts.append(f"most frequent label {escape(str(row['top_label']))} ({share})")
    return f"**{name}** · {' · '.join(facts)}\n\n![{name}: its strongest images]({picture.file})"


def _training(run: RunFiles) -> str:
    parts = []
    if run.log:
        last = run.log[-1]
        cells = [(each.name, each.show(each.of(last))) for each in shown_in("card")]
        known = [(name, cell) for name, cell in cells if cell != NOT_MEASURED]
        parts += [
            "The last line of its log, over the batches since the line before:",
            table([name for name, _ in known], [[cell for _, cell in known]]),
        ]
    if run.config:
        parts.append(fenced(without_folders(run.config), "toml"))
    return "\n\n".join(parts) or "Not recorded."
