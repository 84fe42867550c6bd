"""`write_report`: one page that shows how good the SAEs of runs are and what they see."""

from __future__ import annotations

import base64
import datetime
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from sparsight.config import check_seed
from sparsight.errors import UserError
from sparsight.figures import NOT_MEASURED, count
from sparsight.files import check_file, write_text
from sparsight.latents.run_files import RunFiles, find_runs, read_run, run_names
from sparsight.latents.run_models import RunModels
from sparsight.latents.seeing import LARGEST
from sparsight.latents.stored import find_stored, needs_model
from sparsight.latents.views import RunView, make_view
from sparsight.pages import scores
from sparsight.pages.data_uris import encode_picture, is_crisp
from sparsight.pages.template import made_with, page_css, script, style, template
from sparsight.redaction import without_folders
from sparsight.vision import VisionModel

MAX_BYTES = 4_700_000
NOTES_TOLD = 3
"""Notes of a run that are also printed; the page has all of them."""

THUMBNAILS = (LARGEST, 192, 176, 160, 144, 128, 112, 96, 72)
"""Longest sides of images, in pixels, tried in turn until the page is small enough."""

SMALL = 112
"""Longest side of the images that only appear as small samples."""

IN_STRIP = 8
"""Latents per site at the top of a page about several sites."""


def write_report(
    runs: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    model: VisionModel | str | None = None,
    latents: int = 32,
    seed: int = 0,
    title: str | None = None,
    max_bytes: int = MAX_BYTES,
    quiet: bool = False,
) -> Path:
    """Write one self-contained HTML page about runs: no network, no other files.

    The page begins with images of the latents that are easiest to understand, outlined where each
    is active. It names what was not measured, and the command that measures it.

    Args:
        runs: run folders, or one folder that contains runs.
        out: file of the page, or a folder, in which `report.html` is then written.
        model: the model that tells where in an image latents are active, if neither codes nor
            activations of the images are on disk; default: the model that the index names. If it
            cannot be loaded, the page says so and shows the images without outlines.
        latents: cards per run; three quarters are the latents that are easiest to understand, the
            rest are drawn at random.
        seed: seed of the random choice.
        title: heading; default: the model and the images.
        max_bytes: largest size of the page; images shrink until it fits, and a note on stderr says
            if that is not enough.
        quiet: show no progress bar.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no runs, or the index was built with another model than `model`.
        SparsightError: a file of a run is damaged.
    """
    check_seed(seed)
    if latents < 0:
        raise UserError(f"latents is {latents}; it must be 0 or more.")
    out = Path(out)
    if out.is_dir() or not out.suffix:
        out = out / "report.html"
    check_file(out)
    folders = find_runs(runs)
    found = [read_run(*pair) for pair in zip(folders, run_names(folders), strict=True)]
    models = RunModels(model)
    views = []
    for i, run in enumerate(found):
        stored = find_stored(run) if latents else None
        used = models.of(run, needed=bool(latents) and needs_model(run, stored))
        views.append(
            make_view(run, f"run{i}", used, latents=latents, seed=seed, quiet=quiet, stored=stored)
        )
    page = _page_of_size(found, views, title, max_bytes)
    size = len(page.encode())
    if size > max_bytes and not quiet:
        print(
            f"note: {out} has {size / 1e6:.1f} MB; show fewer latents to make it smaller.",
            file=sys.stderr,
        )
    if not quiet:
        for view in views:
            _tell(view)
    write_text(out, page)
    return out


def _tell(view: RunView) -> None:
    """Say on stderr what the page could not show."""
    notes = list(dict.fromkeys(view.gallery.notes)) if view.gallery else []
    more = f" ({len(notes) - NOTES_TOLD:,} more on the page)" if len(notes) > NOTES_TOLD else ""
    for i, note in enumerate(notes[:NOTES_TOLD]):
        end = more if i == NOTES_TOLD - 1 else ""
        print(f"note: {view.name}: {note}{end}", file=sys.stderr)


def _page_of_size(
    runs: Sequence[RunFiles], views: Sequence[RunView], title: str | None, max_bytes: int
) -> str:
    """Render the page with the largest images that fit; with the smallest if none does."""
    page, images, last = "", 0, LARGEST
    for thumbnail in THUMBNAILS:
        # An image's bytes grow with its side, somewhat slower than its area does.
        smaller = images * (thumbnail / last) ** 1.3
        fits = len(page) - images + smaller <= max_bytes
        if page and not fits and thumbnail != THUMBNAILS[-1]:
            continue
        css = _picture_css(views, thumbnail)
        page, images, last = _page(runs, views, title, css), len(css), thumbnail
        if len(page.encode()) <= max_bytes:
            break
    return page


def _page(
    runs: Sequence[RunFiles], views: Sequence[RunView], title: str | None, picture_css: str
) -> str:
    code = script("report.js")
    return template("report.html.jinja").render(
        title=title or _title(views),
        place=", ".join(dict.fromkeys(view.site for view in views)),
        lead=_lead(views),
        facts=_facts(runs),
        runs=views,
        sites=scores.sites_table(
            [(view.heading, run.metrics) for view, run in zip(views, runs, strict=True)]
        ),
        strip_length=IN_STRIP,
        outlined=any(view.outlined for view in views),
        glossary=scores.GLOSSARY,
        not_measured=NOT_MEASURED,
        css=page_css(),
        report_css=Markup(style("report.css")),
        picture_css=Markup(picture_css),
        script=Markup(code),
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    )


def _title(views: Sequence[RunView]) -> str:
    """Say what the page is about: the model and the images, or the SAE if there are none."""
    models = " and ".join(dict.fromkeys(view.model for view in views))
    images = " and ".join(dict.fromkeys(view.images for view in views if view.images))
    return f"What {models} sees in {images}" if images else f"Sparse autoencoders of {models}"


def _lead(views: Sequence[RunView]) -> str:
    """Say in a few sentences what the reader looks at."""
    first = views[0]
    if not first.cards:
        return (
            f"Figures of {len(views)} sparse autoencoder{'s' if len(views) > 1 else ''} (SAEs). "
            "The images that activate the latents appear once there is an index."
        )
    what = (
        f"A sparse autoencoder took the activations of {first.model} at {first.site} apart into "
        f"{first.n_latents:,} latents. "
    )
    if len(views) > 1:
        what = f"Sparse autoencoders took the activations of {first.model} apart into latents. "
    where = ", outlined where it is active" if any(view.outlined for view in views) else ""
    return (
        f"{what}Each block is one latent: the images that activate it most{where}. "
        f"The best understood come first. Click an image to enlarge it."
    )


def _facts(runs: Sequence[RunFiles]) -> list[tuple[str, str]]:
    first = runs[0]
    images = dict.fromkeys(
        f"{count(run.index.manifest['images']['n_images'])} of "
        f"{without_folders(run.index.manifest['images']['source'])}"
        for run in runs
        if run.index is not None
    )
    facts = [
        ("Model", " · ".join(dict.fromkeys(_model_name(run) for run in runs))),
        ("Sites", ", ".join(dict.fromkeys(run.site for run in runs))),
        ("Images", "; ".join(images)),
        ("Date", f"{datetime.datetime.now(datetime.UTC):%-d %B %Y, %H:%M} UTC"),
        ("Made with", made_with()),
    ]
    seed = first.sae.metadata.get("seed")
    if seed is not None:
        facts.append(("Seed", str(seed)))
    return [(name, value) for name, value in facts if value]


def _model_name(run: RunFiles) -> str:
    revision = run.model.get("revision")
    return without_folders(str(run.model.get("id", "unknown"))) + (
        f" ({str(revision)[:10]})" if revision else ""
    )


def _picture_css(views: Sequence[RunView], thumbnail: int) -> str:
    """Make one CSS class per image, so that several cards can show one copy of it."""
    rules: list[str] = []
    for view in views:
        if view.gallery is None:
            continue
        for key, picture in view.gallery.pictures.items():
            crisp = ";image-rendering:pixelated" if is_crisp(picture) else ""
            side = min(thumbnail // 2, SMALL) if key in view.gallery.small else thumbnail
            rules.append(f".{key}{{background-image:url({encode_picture(picture, side)}){crisp}}}")
    return "\n".join(rules)
