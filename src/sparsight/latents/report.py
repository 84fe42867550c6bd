"""`write_report`: one page that shows what the SAEs of some runs are worth and what they see."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from sparsight.config import check_seed
from sparsight.errors import SparsightError, UserError
from sparsight.figures import NOT_MEASURED, count, percent, rounded
from sparsight.files import check_file, write_text
from sparsight.latents import scores
from sparsight.latents.cards import (
    LARGEST,
    TOP_SHOWN,
    encode_picture,
    is_crisp,
)
from sparsight.latents.run_files import RunFiles, find_runs, read_run, run_names
from sparsight.latents.stored import find_stored, needs_model
from sparsight.latents.views import RunView, make_view
from sparsight.redaction import without_folders
from sparsight.vision import VisionModel, load_model

TEMPLATES = Path(__file__).parent / "templates"
POLICY = Markup(
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""What a browser allows each page: it loads nothing, and runs no script."""
MAX_BYTES = 4_000_000
THUMBNAILS = (LARGEST, 160, 128, 96, 72)
"""Longest sides of pictures, in pixels, tried in turn until the page is light enough."""


def write_report(
    runs: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    model: VisionModel | str | None = None,
    latents: int = 24,
    seed: int = 0,
    title: str | None = None,
    max_bytes: int = MAX_BYTES,
    quiet: bool = False,
) -> Path:
    """Write one HTML page about some runs that needs nothing else: no network, no other file.

    What was not measured is named, with the command that measures it.

    Args:
        runs: run folders, or one folder with runs in it.
        out: the page; a folder gives `report.html` in it.
        model: what the heatmaps are made with where neither codes nor activations of the images
            are on disk; default the model that the index names. Where that cannot be loaded the
            page says so and shows the pictures alone.
        latents: cards per run; half have the highest-scoring names, the others are drawn at random.
        seed: of the random ones.
        title: heading; default the model's id.
        max_bytes: pictures are made smaller until the page is; where that is not enough, a note
            on stderr says so.
        quiet: no progress bar.

    Returns:
        The path of the page.

    Raises:
        UserError: no run is there, or `model` is another one than the index was built with.
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
    for thumbnail in THUMBNAILS:
        page = _page(found, views, title, thumbnail)
        if len(page.encode()) <= max_bytes:
            break
    else:
        if not quiet:
            size = f"{len(page.encode()) / 1e6:.1f} MB"
            print(f"note: {out} has {size}; fewer latents make it lighter.", file=sys.stderr)
    write_text(out, page)
    return out


class RunModels:
    """Loads each vision model once, as it was; remembers why one could not be loaded."""

    def __init__(self, given: VisionModel | str | None) -> None:
        self._given = load_model(given) if isinstance(given, str) else given
        self._found: dict[str, VisionModel | str] = {}

    def of(self, run: RunFiles, *, needed: bool = True) -> VisionModel | str | None:
        """The model of a run, or the reason why it is not there.

        Args:
            run: the SAE and what lies around it.
            needed: if not, None without loading anything, unless a model was given.

        Raises:
            UserError: the model that was given is another one.
        """
        if self._given is None and not needed:
            return None
        wanted = run.model
        model = self._given or self._load(wanted)
        if isinstance(model, str):
            return model
        if wanted.get("weights_hash") not in (None, model.weights_hash):
            text = (
                f"{model.id} is not the model of {run.folder} ({wanted.get('id')}): its weights "
                "differ."
            )
            if self._given is not None:
                raise UserError(text)
            return text
        return model

    def _load(self, wanted: Mapping[str, Any]) -> VisionModel | str:
        id, revision, dtype = str(wanted.get("id")), wanted.get("revision"), wanted.get("dtype")
        scaled = "jpeg_min_side" in (wanted.get("preprocessing") or {})
        key = f"{id} {revision} {dtype} {scaled}"
        if key not in self._found:
            try:
                self._found[key] = load_model(
                    id, revision=revision, dtype=dtype, scale_jpegs=scaled
                )
            except SparsightError as error:
                self._found[key] = str(error)
        return self._found[key]


def _page(
    runs: Sequence[RunFiles], views: Sequence[RunView], title: str | None, thumbnail: int
) -> str:
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    ids = dict.fromkeys(
        without_folders(str(run.model["id"])) for run in runs if run.model.get("id")
    )
    return template().render(
        title=title or " · ".join(ids) or runs[0].name,
        facts=_facts(runs),
        runs=views,
        glossary=scores.GLOSSARY,
        not_measured=NOT_MEASURED,
        top_shown=TOP_SHOWN,
        css=page_css(),
        picture_css=Markup(_picture_css(views, thumbnail)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
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
    """A class a picture, so that one that is on several cards is on the page once."""
    rules: list[str] = []
    for view in views:
        for key, picture in (view.gallery.pictures if view.gallery else {}).items():
            crisp = ";image-rendering:pixelated" if is_crisp(picture) else ""
            rules.append(
                f".{key}{{background-image:url({encode_picture(picture, thumbnail)}){crisp}}}"
            )
    return "\n".join(rules)


@cache
def template(name: str = "report.html.jinja", folder: Path = TEMPLATES) -> jinja2.Template:
    """A page's template; it may import the macros of the report.

    All text that is put into it is escaped, and its paths lose their folders.

    Args:
        name: of the file.
        folder: where it lies.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.globals.update(figure=rounded, percent=percent, policy=POLICY)
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return without_folders(value) if is_text and not value.startswith("data:image/") else value


def page_css() -> Markup:
    """The look of every page."""
    return Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))


def made_with() -> str:
    """Versions of Sparsight, torch and Python."""
    try:
        version = " " + importlib.metadata.version("sparsight")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = ""
    return f"Sparsight{version}, torch {torch.__version__}, Python {platform.python_version()}"
