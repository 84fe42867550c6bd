"""Which formats there are, and which of them files are in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format
from sparsight.formats.clipscope import CLIPScope
from sparsight.formats.dictionary_learning import DictionaryLearning
from sparsight.formats.dncbm import DNCBM
from sparsight.formats.llamascopium import Llamascopium
from sparsight.formats.msae import MSAE
from sparsight.formats.openai import OpenAI
from sparsight.formats.overcomplete import Overcomplete
from sparsight.formats.patchsae import PatchSAE
from sparsight.formats.prisma import Prisma
from sparsight.formats.saelens import SAELens
from sparsight.formats.saev import Saev
from sparsight.formats.sparsify import Sparsify
from sparsight.formats.visaebench import VisAEBench
from sparsight.plugins import FORMAT_PLUGINS, Plugin, plugin_named, usable_plugins, warn_once

FORMATS: tuple[Format, ...] = (
    Saev(),
    CLIPScope(),
    OpenAI(),
    MSAE(),
    DNCBM(),
    PatchSAE(),
    Prisma(),
    Llamascopium(),
    Sparsify(),
    SAELens(),
    VisAEBench(),
    Overcomplete(),
    DictionaryLearning(),
)
"""Sparsight's own formats, in the order in which they are asked whether they recognise files."""

OWN = "sparsight"
"""The name of our own format, which no `Format` stands for."""


def formats() -> tuple[Format, ...]:
    """Return all formats: Sparsight's own, then those that other packages register.

    A format that cannot be loaded is left out, and the logger "sparsight" says why.
    """
    return (*FORMATS, *_outside())


def find(name: str) -> Format:
    """Return the format with this name.

    Raises:
        UserError: there is none, or several packages register one.
        SparsightError: the package that registers it is broken.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    plugin = plugin_named(FORMAT_PLUGINS, name)
    if plugin is not None:
        return _made(plugin)
    names = ", ".join(format.name for format in formats())
    raise UserError(f"{name!r} is not a format; there are {names}.")


def recognise(found: Candidate) -> Format:
    """Return the format of some files.

    Raises:
        UserError: no format recognises them; the message lists what was found.
        SparsightError: a file is damaged.
    """
    first: SparsightError | None = None
    for format in itertools.chain(FORMATS, _outside()):
        try:
            if format.recognises(found):
                return format
        except SparsightError as error:
            first = first or error
        except Exception as error:
            if format in FORMATS:
                first = first or _misfit(found, format, error)
            else:  # a faulty package must not hide what the other formats say
                fault = f"{type(error).__name__}: {error}"
                warn_once(f"{found.name}: {format.title} failed to look at it ({fault}).")
    if first is not None:
        raise first
    found.check_below()
    raise UserError(
        f"{found.name}: holds no SAE in a format that Sparsight reads "
        f"({', '.join(format.title for format in formats())}). {_inventory(found)}"
    )


def read(path: Path, name: str | None = None) -> Foreign:
    """Read a checkpoint of another project.

    Args:
        path: a folder or a file.
        name: the user's name for it, for messages.

    Raises:
        UserError: the format is unknown, or the SAE has a part that Sparsight does not support.
        SparsightError: a file is damaged.
    """
    found = Candidate(path, name)
    format = recognise(found)
    try:
        return format.load(found)
    except SparsightError as error:
        if found.name in str(error) or str(found.folder) in str(error):
            raise
        kind = UserError if isinstance(error, UserError) else SparsightError
        raise kind(f"{found.name}: {error}") from error
    except Exception as error:
        raise _misfit(found, format, error) from error


def _outside() -> Iterator[Format]:
    """Give the formats of other packages, each loaded when its turn comes."""
    for plugin in usable_plugins(FORMAT_PLUGINS, {OWN, *(each.name for each in FORMATS)}).values():
        try:
            yield _made(plugin)
        except SparsightError as error:
            warn_once(str(error))


def _made(plugin: Plugin) -> Format:
    """Make the format that a plug-in names, by its class or an instance.

    Raises:
        SparsightError: it cannot be loaded, or is no format, or calls itself something else.
    """
    value = plugin.load()
    try:
        format = value() if isinstance(value, type) else value
    except Exception as error:
        raise plugin.fault(f"cannot be made ({type(error).__name__}: {error})") from error
    if not isinstance(format, Format):
        raise plugin.fault("is no sparsight.formats.Format")
    if format.name != plugin.name:
        raise plugin.fault(f"calls itself {format.name!r}; the two names must be the same")
    return format


def _misfit(found: Candidate, format: Format, error: Exception) -> SparsightError:
    """Return the error for an untrusted file, in which a wrong type or shape may occur anywhere."""
    told = str(error).strip().partition("\n")[0]
    return SparsightError(
        f"{found.name}: looks like a checkpoint of {format.title}, but is damaged or of another "
        f"kind ({type(error).__name__}: {told})."
    )


def _inventory(found: Candidate) -> str:
    if not found.weights:
        files = ", ".join(found.files[:12]) + (", …" if len(found.files) > 12 else "")
        return f"Found no file with tensors; there is: {files or 'nothing'}."
    parts = []
    for file in found.weights[:4]:
        keys = sorted(found.keys(file))
        kept = ", ".join(each[:60] for each in keys[:12]) + (", …" if len(keys) > 12 else "")
        parts.append(f"{file} has {kept or 'no names at its top'}")
    return f"Found: {'; '.join(parts)}."
