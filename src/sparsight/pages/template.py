"""The templates and the style sheet of every page; all text in them is escaped."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from sparsight.figures import percent, rounded
from sparsight.redaction import without_folders

TEMPLATES = Path(__file__).parent / "templates"
POLICY = Markup(
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""Content security policy of every page: load nothing, run no script."""


@cache
def template(name: str) -> jinja2.Template:
    """Return the template of a page, which may import the shared macros.

    All text in it is escaped, and paths are cut to their last part.

    Args:
        name: name of the file in `templates/`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
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
    """Return the style sheet of every page."""
    return Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))


def style(name: str) -> str:
    """Return the text of a style sheet in `templates/`, for one kind of page."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def script(name: str) -> str:
    """Return the text of a script in `templates/`; the page's policy must contain its hash."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def made_with() -> str:
    """Return the versions of Sparsight, torch and Python."""
    try:
        version = " " + importlib.metadata.version("sparsight")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = ""
    return f"Sparsight{version}, torch {torch.__version__}, Python {platform.python_version()}"
