"""Text from others' files: names that are not UTF-8, line breaks of every kind."""

from __future__ import annotations

import os
import re
from pathlib import Path

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Matches what UTF-8 cannot hold; Python never keeps a pair of surrogates as two."""

_ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")


def without_surrogates(text: str) -> str:
    r"""Escape what no file can hold as UTF-8.

    A byte of a file name that is not UTF-8 (Python keeps it as a surrogate) becomes `\xNN`; any
    other lone surrogate, such as half an emoji in a JSON file, becomes `\uNNNN`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return LONE_SURROGATE.sub(_escaped, text)
    return text


def shortened(text: str, length: int = 60) -> str:
    """Return a text of at most `length` characters, for messages; what is left out becomes `…`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def decoded(data: bytes) -> str:
    r"""Decode bytes as UTF-8; invalid bytes become `\xNN`, as in `without_surrogates`."""
    return data.decode("utf-8", "backslashreplace")


def lines(text: str) -> list[str]:
    """Split a text into lines that end in LF or CR LF.

    `str.splitlines` also splits at U+2028, U+0085 and six more, which JSON and CSV allow in values.
    """
    return [line.removesuffix("\r") for line in text.split("\n")]


def path_of(text: str | Path) -> Path:
    r"""Return the path that a text names.

    If nothing exists at the path as it is, but something does once each `\xNN` is read as the byte
    that `without_surrogates` escaped, it is that path.
    """
    if not os.path.lexists(text):
        bytes_of = _ESCAPED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), str(text))
        if os.path.lexists(bytes_of):
            return Path(bytes_of)
    return Path(text)


def _escaped(surrogate: re.Match[str]) -> str:
    code = ord(surrogate[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
