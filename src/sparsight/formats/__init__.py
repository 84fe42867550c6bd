"""Checkpoints of other projects, one file each: how to recognise, read and write them.

Start at `base`, which says what a `Format` is. `registry` finds the format of files by their
content, and `loading` reads an SAE, ours or another project's, from a folder, a file or the Hub.
Untrusted files are read by `sparsight.reading`, `tensor_files` and `pickles`.
"""

from sparsight.formats.base import Candidate, Foreign, Format
from sparsight.formats.loading import load
from sparsight.formats.registry import FORMATS, find, formats, read, recognise

__all__ = [
    "FORMATS",
    "Candidate",
    "Foreign",
    "Format",
    "find",
    "formats",
    "load",
    "read",
    "recognise",
]
