"""Which formats there are, and which of them some files are in."""

from __future__ import annotations

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
"""In the order in which they are asked whether they recognise some files."""


def find(name: str) -> Format:
    """The format of this name.

    Raises:
        UserError: there is none.
    """
    for each in FORMATS:
        if each.name == name:
            return each
    raise UserError(f"{name!r} is no format; there are {', '.join(e.name for e in FORMATS)}.")


def recognise(found: Candidate) -> Format:
    """The format of some files.

    Raises:
        UserError: it is none of them; the message lists what was found.
        SparsightError: a file is damaged.
    """
    first: SparsightError | None = None
    for each in FORMATS:
        try:
            if each.recognises(found):
                return each
        except SparsightError as error:
            first = first or error
        except Exception as error:
            first = first or _misfit(found, each, error)
    if first is not None:
        raise first
    found.check_below()
    raise UserError(
        f"{found.name}: holds no SAE in a format that Sparsight reads "
        f"({', '.join(each.title for each in FORMATS)}). {_inventory(found)}"
    )


def read(path: Path, name: str | None = None) -> Foreign:
    """Read a checkpoint of another project.

    Args:
        path: a folder or a file.
        name: what the user called it, for messages.

    Raises:
        UserError: the format is unknown, or the SAE has a part that Sparsight has no equal of.
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


def _misfit(found: Candidate, format: Format, error: Exception) -> SparsightError:
    """For files nobody vouches for: a wrong type or shape may come up at any place."""
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


__all__ = ["FORMATS", "Candidate", "Foreign", "Format", "find", "read", "recognise"]
