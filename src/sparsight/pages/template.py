"""The templates and the style sheet of every page; what is put into them is escaped."""

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
"""What a browser allows each page: it loads nothing, and runs no script."""


@cache
def template(name: str) -> jinja2.Template:
    """A page's template, which may import the macros of all.

    All text that is put into it is escaped, and its paths lose their folders.

    Args:
        name: of the file in `templates/`.
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
    """The look of every page."""
    return Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))


def script(name: str) -> str:
    """The text of a script in `templates/`; the page's policy must name its hash."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def made_with() -> str:
    """Versions of Sparsight, torch and Python."""
    try:
        version = " " + importlib.metadata.version("sparsight")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = ""
    return f"Sparsight{version}, torch {torch.__version__}, Python {platform.python_version()}"
