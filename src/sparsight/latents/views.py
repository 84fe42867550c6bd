"""One run as the report shows it: tiles, plots, tables, cards, and what is missing."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from sparsight.errors import SparsightError
from sparsight.figures import count
from sparsight.latents.cards import Gallery, make_gallery
from sparsight.latents.dead_latents import dead_latents_table
from sparsight.latents.drawing import density_histogram, density_scatter, error_by_position
from sparsight.latents.run_files import RunFiles
from sparsight.latents.stored import StoredCodes
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
    shape: str
    missing: Sequence[str]
    tiles: Sequence[Tile]
    plots: Sequence[Plot]
    tables: Sequence[Table]
    attributes: Table | None
    config: str
    gallery: Gallery | None
    heatmaps: bool
    named: bool


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
        stored: where heatmaps can be read.
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
            gallery.notes.insert(0, f"No heatmaps: the model is not available. {model}")
    measured = "fvu" in run.metrics
    tables = [
        table
        for make in (scores.reconstruction_table, scores.downstream_table, scores.truth_table)
        if measured and (table := make(run.metrics)) is not None
    ]
    dead = _dead_latents(run)
    if dead is not None:
        tables.append(dead)
    cards = gallery.cards if gallery else []
    return RunView(
        key=key,
        name=run.name,
        site=run.site,
        shape=_shape(run),
        missing=(*run.missing, *(scores.not_measured(run.metrics) if measured else ())),
        tiles=scores.tiles(run.metrics) if measured else [],
        plots=_plots(run, key, model),
        tables=tables,
        attributes=scores.attribute_table(run.metrics),
        config=without_folders(run.config),
        gallery=gallery,
        named=any(card.chosen == "named" for card in cards),
        heatmaps=any(shot.heat for card in cards for shot in card.top),
    )


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
        text = "Each dot is a latent. A dark dot's strongest images share one label."
        if table["label_entropy"].null_count == len(table):
            text = "Each dot is a latent. Label entropy is unknown: it needs 10 labelled images."
        drawn.append(("scatter", "Density and activation", text, density_scatter(table)))
    return [
        Plot(title, text, Markup(to_svg(figure, f"{key}-{name}", title)))
        for name, title, text, figure in drawn
    ]


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
