"""Paths without the folders that contain them, for everything that other people get to see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

HOME = "~"
"""Stands for a home folder, whose last part is a person's name."""

_HOMES = {"home", "homes", "users"}

# A character in any spelling that it has in URLs, JSON, TOML and HTML, nested or not.
_SPELLING = re.compile(
    r"%(?:25)*(?P<percent>[0-7][0-9A-Fa-f])"
    r"|\\+u(?P<unicode>[0-9A-Fa-f]{4})"
    r"|&(?:amp;)*#x0*(?P<hexadecimal>[0-7][0-9A-Fa-f]);"
    r"|&(?:amp;)*#0*(?P<decimal>\d{2,3});"
    r"|(?P<slash>\\+/|&(?:amp;)*sol;)"
    r"|\\+(?P<line>[nrt])(?=[/~])"
    r"|(?P<backslash>\\{2,})"
)

_SEPARATOR = r"[\\/]+"
# Addresses, and pixels in text; of `open_clip:NAME/FILE`, the part before the file.
_OTHER = (
    r"(?:https?|wss?|ftps?|sftp|ssh|git|s3|gs|gcs|az|abfss?|hf)://(?!/)(?:[^\s\"'<>`?#,;]|[,;](?![\\/~]))*"
    r"|data:[\w.+/-]*;base64,[\w+/=]*"
)
_START = (
    r"(?:(?P<clip>open_clip:[^\s/\\\"']+/)|(?<![\w.%~)\]}*\\/-])"
    r"|(?<![A-Za-z0-9.%~)\]}\\/])(?=/+(?:home|Users)/))"
    r"(?P<root>file:(?://[\w.-]*)?(?=[\\/])(?:[\\/]+[A-Za-z]:)?" + _SEPARATOR + r""
    r"|(?:\\+[?.]\\+)?[A-Za-z]:" + _SEPARATOR + r""
    r"|~(?:[A-Za-z_][\w.-]*)?" + _SEPARATOR + r""
    r"|/[\\/]*"
    r"|\\(?=\w[\w.$-]*\\\w))"
)
_NEXT = re.compile(rf"(?P<other>{_OTHER})|(?P<table>(?:{_SEPARATOR})?\?table=)|{_START}")

# Words that end a path in a sentence; other words after a space may belong to a folder's name.
_ENDS = (
    r"(?:a|an|and|are|as|at|but|by|cannot|for|from|has|have|in|into|is|no|not|of|on|or|than|that"
    r"|the|to|was|were|which|with)\b"
)
_WORD = r"(?:\([^()\s\\/\"']*\)|\{[^{}\s\\/\"']*\}|[^\s\\/\"'`<>(){}|?,;:&]|[,;:](?![\s\\/~]|$))+"
_PART = rf"{_WORD}(?:[ ](?!{_ENDS})(?=[\w({{]){_WORD})*"
_FOLDER = re.compile(rf"(?P<name>{_PART}){_SEPARATOR}")
_LAST = re.compile(rf"{_PART}")
_LAST_WORD = re.compile(
    r"(?:\{[^{}\s\\/\"']*\}|[^\s\\/\"'`<>()\[\]{}|?,;:&=])*(?:\}|[^\s\\/\"'`<>()\[\]{}|?,;:&=.])"
)
_CLOSING = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}


def without_folders(text: str) -> str:
    """Cut absolute paths to their last part, because pages are mailed and paths name people.

    Home folders become `~`. Paths are found in every spelling that they have in URLs, JSON, TOML
    and HTML, and inside sentences and specs of images, from which the file with the labels is left
    out, too. Addresses on the web and relative paths stay.
    """
    if "/" not in text and "\\" not in text and "%" not in text and "#" not in text:
        return text
    plain, places = _plain(text)
    parts: list[str] = []
    done = 0
    for start, end, instead in _cuts(plain):
        parts += [text[done : places[start]], instead]
        done = places[end]
    return "".join(parts) + text[done:]


def without_folders_in(value: Any) -> Any:
    """Apply `without_folders` to all texts in nested mappings and lists, including keys."""
    if isinstance(value, Mapping):
        return {without_folders_in(key): without_folders_in(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders_in(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def _plain(text: str) -> tuple[str, list[int]]:
    """Return the text with characters spelt plainly; where each begins in `text`, and its end."""
    characters: list[str] = []
    places: list[int] = []
    done = 0
    for match in _SPELLING.finditer(text):
        characters += text[done : match.start()]
        places += range(done, match.start())
        characters.append(_character(match))
        places.append(match.start())
        done = match.end()
    characters += text[done:]
    places += range(done, len(text) + 1)
    return "".join(characters), places


def _character(match: re.Match[str]) -> str:
    kind = str(match.lastgroup)
    match kind:
        case "slash":
            return "/"
        case "backslash":
            return "\\"
        case "line":
            return "\n"
        case _:
            return chr(int(match[kind], 10 if kind == "decimal" else 16))


def _cuts(text: str) -> Iterator[tuple[int, int, str]]:
    """Find what to leave out: its start, its end, and what replaces it."""
    place = 0
    while match := _NEXT.search(text, place):
        place = match.end()
        if match["other"]:
            continue
        if match["table"]:
            place = _end_of_table(text, place)
            yield match.start(), place, ""
            continue
        start = match.start("root")
        cut = _cut(text, start, match)
        if cut is not None:
            place, instead = cut
            yield start, place, instead


def _end_of_table(text: str, place: int) -> int:
    """Return where the path of a file with labels ends."""
    if root := re.compile(_START).match(text, place):
        place = root.end()
    while folder := _FOLDER.match(text, place):
        place = folder.end()
    last = re.compile(rf"[^\[\]]*?(?=\[)|{_PART}").match(text, place)
    name = _LAST.match(text, place) if last is None else last
    end = place if name is None else name.end()
    # A selection is not part of the name.
    bracket = text.find("[", place, end)
    return end if bracket < 0 else bracket


def _cut(text: str, start: int, match: re.Match[str]) -> tuple[int, str] | None:
    """Return where the last part of a path begins, and what replaces everything before it."""
    folder, last = _patterns(text, start)
    place, names, ends = match.end(), [], [match.end()]
    while part := folder.match(text, place):
        place = part.end()
        names.append(part["name"].lower())
        ends.append(place)
    rest = last.match(text, place)
    if rest is None and not names:  # only a slash
        return None
    if (rest is None and names[-2:-1] and names[-2] in _HOMES) or (
        rest is not None and names and names[-1] in _HOMES
    ):
        end = place if rest is None else rest.end()
        return end, HOME + (text[place - 1] if rest is None else "")
    if rest is None:  # the last folder's name, with the slash at its end
        names.pop()
        ends.pop()
    if not names and match["root"].strip("\\/") == "":
        return None  # `/photos` names nobody
    return ends[-1], ""


def _patterns(text: str, start: int) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns for a folder and for the last part: in quotes, they extend to the end."""
    closing = _CLOSING.get(text[start - 1]) if start else None
    end = text.find(closing, start) if closing else -1
    if closing is None or end < 0 or "\n" in text[start:end]:
        return _FOLDER, _LAST_WORD
    name = rf"(?:(?!\?table=)[^\\/\n{re.escape(closing)}])+"
    last = rf"[^\\/\n?\[{re.escape(closing)}]+"
    return re.compile(rf"(?P<name>{name}){_SEPARATOR}"), re.compile(last)
