"""Large pages for large tensors: with small pages, looking up addresses takes much time."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

_PAGE = 4096
_LARGE_PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25
"""Linux' advice to use large pages from now on, and for memory in use already (Linux 6.1)."""


def use_large_pages(*tensors: Tensor) -> None:
    """Advise the system to use large pages for some tensors on the CPU.

    If it has none, or another interface, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    for each in tensors:
        storage = each.untyped_storage()
        begin = -(-storage.data_ptr() // _PAGE) * _PAGE
        end = (storage.data_ptr() + storage.nbytes()) // _PAGE * _PAGE
        if each.device.type != "cpu" or end - begin < 2 * _LARGE_PAGE:
            continue
        for advice in (_HUGEPAGE, _COLLAPSE):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
