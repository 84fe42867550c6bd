"""One run as the report shows it: tiles, plots, tables, cards, and what is missing."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from sparsight.errors import SparsightError
from sparsight.figures import count
from sparsight.latents.cards import Card, Gallery, make_gallery
from sparsight.latents.dead_latents import dead_latents_table
from sparsight.latents.drawing import density_histogram, density_scatter, error_by_position
from sparsight.latents.run_files import RunFiles
from sparsight.latents.stored import StoredCodes
from sparsight.latents.table_data import as_json, table_data
from sparsight.pages import plots, scores
from sparsight.pages.style import to_svg
from sparsight.pages.tables import Plot, Table, Tile
from sparsight.progress import progress
from sparsight.redaction import without_folders
from sparsight.sae.remedies import Remedy
from sparsight.training.old_keys import remedies_in
from sparsight.training.run import METRICS
from sparsight.vision import VisionModel


@dataclass(frozen=True)
class RunView:
    """Everything that the template shows of one run."""

    key: str
    name: str
    site: str
    heading: str
    folder: str
    n_latents: int
    shape: str
    model: str
    images: str
    missing: Sequence[str]
    warning: str
    tiles: Sequence[Tile]
    plots: Sequence[Plot]
    tables: Sequence[Table]
    attributes: Table | None
    config: str
    gallery: Gallery | None
    latents: Markup
    """Columns about all latents, as JSON; empty without an index."""
    fires: Markup
    """By image, the shown latents that are active in it, as JSON."""
    commands: Sequence[tuple[str, str]]
    """What to do next, and the command that does it."""

    @property
    def outlined(self) -> bool:
        """Whether any image has an outline."""
        return any(shot.path for card in self.cards for shot in card.top)

    @property
    def cards(self) -> Sequence[Card]:
        """All cards."""
        return self.gallery.cards if self.gallery else []

    @property
    def best(self) -> Sequence[Card]:
        """The cards of the best understood latents."""
        return [card for card in self.cards if card.chosen == "best"]

    @property
    def random(self) -> Sequence[Card]:
        """The cards of latents drawn at random."""
        return [card for card in self.cards if card.chosen == "random"]


def make_view(
    run: RunFiles,
    key: str,
    model: VisionModel | str | None,
    *,
    latents: int,
    seed: int,
    quiet: bool,
    stored: StoredCodes | None = None,
) -> RunView:
    """Draw, tabulate and collect the parts of a run.

    Args:
        run: the contents of its folder.
        key: key of the run, unique on the page.
        model: the model that computed its activations, or the reason why it is not available; None
            if it is not needed.
        latents: number of cards.
        seed: seed of the random choice of latents.
        quiet: show no progress bar.
        stored: where activations at patches can be read.
    """
    gallery = None
    if run.index is not None and latents:
        with progress(f"report: {run.name}", None, "images", quiet=quiet) as line:
            gallery = make_gallery(
                run.index,
                run.sae,
                None if isinstance(model, str) else model,
                n=latents,
                seed=seed,
                key=f"{key}-",
                line=line,
                stored=stored,
            )
        if isinstance(model, str):
            gallery.notes.insert(0, f"No outlines: the model is not available. {model}")
    measured = "fvu" in run.metrics
    tables = [
        table
        for make in (scores.reconstruction_table, scores.downstream_table, scores.truth_table)
        if measured and (table := make(run.metrics)) is not None
    ]
    dead = _dead_latents(run)
    if dead is not None:
        tables.append(dead)
    shown = [card.latent for card in gallery.cards] if gallery else []
    return RunView(
        key=key,
        name=run.name,
        site=run.site,
        heading=run.site if run.name == run.site else f"{run.site} · {run.name}",
        folder=run.folder.name,
        n_latents=run.sae.n_latents,
        shape=_shape(run),
        model=model_name(run),
        images=images_name(run),
        missing=(*run.missing, *(scores.not_measured(run.metrics) if measured else ())),
        warning=scores.cls_warning(run.metrics) if measured else "",
        tiles=scores.tiles(run.metrics, run.sae.n_latents, _fixed_k(run)) if measured else [],
        plots=_plots(run, key, model),
        tables=tables,
        attributes=scores.attribute_table(run.metrics),
        config=without_folders(run.config),
        gallery=gallery,
        latents=as_json(table_data(run.index, shown)) if run.index and shown else Markup(""),
        fires=_fires(gallery),
        commands=_commands(run, shown[0]) if shown else [],
    )


def _fires(gallery: Gallery | None) -> Markup:
    """Write which shown latents are active in which image, with activation and outline."""
    found = gallery.fires if gallery else {}
    return as_json(
        {
            key: [(latent, float(f"{value:.4g}"), path) for latent, value, path in rows]
            for key, rows in found.items()
        }
    )


def model_name(run: RunFiles) -> str:
    """Return the name of the vision model for a heading."""
    name = without_folders(str(run.model.get("id") or "the model"))
    return "the calibration CLIP" if name == "calibration" else name


def images_name(run: RunFiles) -> str:
    """Return the name of the image collection for a heading; empty without an index."""
    if run.index is None:
        return ""
    source = without_folders(str(run.index.manifest["images"]["source"]))
    if source.startswith("calibration:"):
        return f"{count(run.index.manifest['images']['n_images'])} rendered scenes"
    return source.rstrip("/").rsplit("/", 1)[-1] or source


def _fixed_k(run: RunFiles) -> int | None:
    """Return the number of latents that are active on every vector, if the sparsity sets it."""
    k = getattr(run.sae.config.sparsity, "k", None)
    return k if isinstance(k, int) else None


def _commands(run: RunFiles, latent: int) -> list[tuple[str, str]]:
    """Return what to do next with a run and one of its latents, as commands."""
    name = shlex.quote(run.folder.name)
    return [
        ("All about one latent", f"sparsight latents {name} {latent}"),
        ("Find latents by label or name", f"sparsight latents {name} --label WORD"),
        ("Every latent in an image of yours", f"sparsight image {name} PHOTO.jpg"),
        ("Turn a latent up and down", f"sparsight steer {name} --latents {latent}"),
    ]


def _dead_latents(run: RunFiles) -> Table | None:
    try:
        return dead_latents_table(run.log, _remedies(run), run.sae.metadata.get("mean_to_spread"))
    except (KeyError, TypeError) as error:
        raise SparsightError(
            f"{run.folder / METRICS}: is damaged: a line lacks {error}, or has it in another "
            "form. Repair or remove the file."
        ) from error


def _remedies(run: RunFiles) -> list[type[Remedy]]:
    """Return the run's remedies for dead latents, from its configuration."""
    try:
        return [*remedies_in(tomllib.loads(run.config).get("train", {}))]
    except tomllib.TOMLDecodeError:
        return []


def _plots(run: RunFiles, key: str, model: VisionModel | str | None) -> list[Plot]:
    drawn: list[tuple[str, str, str, Figure]] = []
    if run.log:
        text = "On the training batches."
        drawn.append(("curves", "Training", text, plots.training_curves(run.log)))
    if run.metrics.get("fvu_by_position"):
        text = "FVU of each token, centred per position."
        known: Mapping[str, Any] = run.model
        if isinstance(model, VisionModel):
            known = {"patch_grid": model.patch_grid, "n_prefix": model.n_prefix}
        position = error_by_position(run.metrics, run.tokens, known)
        drawn.append(("position", "Error by position", text, position))
    if run.index is not None:
        table = run.index.table
        images = count(run.index.manifest["images"]["n_images"])
        text = f"How often each of {len(table):,} latents is active, over {images} images."
        drawn.append(("density", "Density", text, density_histogram(table)))
        text = "Each dot is a latent: click one to see which."
        if table["top_label_share"].null_count < len(table):
            text += " A bright dot's strongest images share one label."
        drawn.append(("scatter", "Density and activation", text, density_scatter(table)))
    return [_plot(f"{key}-{name}", title, text, figure) for name, title, text, figure in drawn]


def _plot(name: str, title: str, text: str, figure: Figure) -> Plot:
    svg = Markup(to_svg(figure, name, title))
    dots = json.dumps(plots.axes_place(figure)) if name.endswith("-scatter") else ""
    return Plot(title, text, svg, dots)


def _shape(run: RunFiles) -> str:
    sparsity = run.sae.config.sparsity
    k = getattr(sparsity, "k", None)
    parts = [
        run.name if run.name != run.site else "",
        f"{run.sae.n_latents:,} latents of width {run.sae.d_in:,}",
        type(sparsity).__name__ + (f", k = {k}" if k else ""),
        f"tokens: {run.tokens}",
    ]
    seen = next((row["vectors"] for row in reversed(run.log) if row.get("vectors")), None)
    if seen:
        parts.append(f"{plots.short(seen)} vectors seen")
    return " · ".join(part for part in parts if part)
