"""Checkpoints of other projects, one file each: how they are told apart, read and written.

Start at `base`: what a `Format` is. `registry` finds the format of some files by their content,
and `loading` reads an SAE, ours or another project's, from a folder, a file or the Hub. Files that
nobody vouches for are read by `sparsight.reading`, `tensor_files` and `pickles`.
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
