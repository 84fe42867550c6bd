"""Vocabularies in files: what a word may be, and messages that name the line where one is not."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsight.errors import UserError
from sparsight.text import LONE_SURROGATE, lines

LONGEST_WORD = 200
"""Longest word or phrase, in characters; text towers read some 60 words at most."""

LARGEST_FILE = 64 * 2**20
"""Largest file that is read as a vocabulary, in bytes."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COLUMNS = ("word", "category", "prompt")
_JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji


@dataclass(frozen=True)
class Entry:
    """One word of a vocabulary.

    Attributes:
        word: a word or short phrase.
        category: what kind of thing it stands for, such as `colour` or `part`; None if unknown.
        prompts: the sentences whose mean embedding stands for the word; if empty, those that the
            vocabulary's templates make.
        line: where it stands in its file, counted from 1; 0 if it is from no file.
    """

    word: str
    category: str | None = None
    prompts: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)


def read_vocabulary_file(path: Path) -> list[Entry]:
    """Read a vocabulary from a `.txt`, `.csv` or `.tsv` file.

    Blanks around a word are cut off; nothing else is changed or left out.

    Raises:
        UserError: see `open_vocabulary`.
    """
    suffix = path.suffix.lower()
    if suffix != ".txt" and suffix not in _DELIMITERS:
        raise UserError(
            f"{path}: a vocabulary is a .txt file with one word or phrase per line, or a .csv or "
            f".tsv file with a column 'word'; {path.suffix or 'no suffix'!r} is none of these."
        )
    text = _read(path)
    if suffix == ".txt":
        rows = lines(text)
        while rows and not rows[-1].strip():
            rows.pop()
        return check_entries(
            str(path), [Entry(row.strip(), line=i) for i, row in enumerate(rows, start=1)]
        )
    return check_entries(str(path), parse_table(str(path), text, _DELIMITERS[suffix]))


def parse_table(name: str, text: str, delimiter: str) -> list[Entry]:
    """Parse a table with a column `word` and, if it has them, `category` and `prompt`.

    Raises:
        UserError: the table has no such column, a row has another number of cells, or it is no
            table.
    """
    rows = io.StringIO(text.rstrip("\r\n"), newline="")
    reader = csv.reader(rows, delimiter=delimiter, strict=True)
    entries: list[Entry] = []
    places: dict[str, int] = {}
    width = 0
    try:
        for row in reader:
            if not places:
                places, width = _columns(name, row), len(row)
            elif not row:
                entries.append(Entry("", line=reader.line_num))
            else:
                if len(row) != width:
                    raise UserError(
                        f"{name}, line {reader.line_num}: {len(row)} cells, but the head has "
                        f"{width}. Quote cells that contain {delimiter!r}."
                    )
                cells = {column: row[place].strip() for column, place in places.items()}
                entries.append(
                    Entry(
                        cells["word"],
                        cells.get("category") or None,
                        (cells["prompt"],) if cells.get("prompt") else (),
                        reader.line_num,
                    )
                )
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num}: not a table ({error}).") from error
    return entries


def check_entries(name: str, entries: Sequence[Entry]) -> list[Entry]:
    """Return the words, all of them fit to name a latent.

    Raises:
        UserError: there are none, or one is blank, repeated, too long or not printable.
    """
    if not entries:
        raise UserError(f"{name}: a vocabulary without words; give at least one word.")
    seen: dict[str, Entry] = {}
    repeated: list[tuple[Entry, Entry]] = []
    for number, entry in enumerate(entries, start=1):
        place = f"{name}, line {entry.line}" if entry.line else f"{name}, word {number}"
        for text in (entry.word, entry.category, *entry.prompts):
            if text is not None:
                _check_text(place, text)
        key = same_word(entry.word)
        if key in seen:
            repeated.append((entry, seen[key]))
        seen.setdefault(key, entry)
    if repeated:
        raise UserError(_about_repeated(name, repeated))
    return list(entries)


def _check_text(place: str, text: str) -> None:
    if not text.strip():
        raise UserError(f"{place}: blank; give a word there or delete the line.")
    if len(text) > LONGEST_WORD:
        raise UserError(
            f"{place}: {len(text):,} characters ({text[:40]!r}…); a word or phrase has at most "
            f"{LONGEST_WORD}."
        )
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cf", "Zl", "Zp") and character not in _JOINERS:
            raise UserError(
                f"{place}: the control character U+{ord(character):04X} in {text!r}; delete it."
            )
    if LONE_SURROGATE.search(text):
        raise UserError(f"{place}: {text!r} is not valid Unicode; correct it.")


def _about_repeated(name: str, repeated: Sequence[tuple[Entry, Entry]]) -> str:
    again, first = repeated[0]
    where = f", line {again.line}" if again.line else ""
    there = f"line {first.line}" if first.line else "an earlier word"
    spelled = "" if again.word == first.word else f" ({first.word!r}; case does not count)"
    more = f" In all, {len(repeated):,} words are repeated." if len(repeated) > 1 else ""
    return (
        f"{name}{where}: {again.word!r} repeats {there}{spelled}; each word may occur once, so "
        f"delete one of the two.{more}"
    )


def same_word(word: str) -> str:
    """Return what two spellings of one word have in common: case and blanks do not count."""
    return " ".join(unicodedata.normalize("NFC", word).casefold().split())


def _columns(name: str, head: Sequence[str]) -> dict[str, int]:
    names = [cell.strip().lower() for cell in head]
    if "word" not in names:
        shown = ", ".join(repr(cell) for cell in head[:6]) or "nothing"
        raise UserError(
            f"{name}, line 1: no column 'word'; the head has {shown}. Begin the file with the line "
            "word,category (or only word)."
        )
    twice = next((column for column in _COLUMNS if names.count(column) > 1), None)
    if twice:
        raise UserError(f"{name}, line 1: two columns are called {twice!r}; rename one.")
    return {column: names.index(column) for column in _COLUMNS if column in names}


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UserError(
                f"{path}: {size:,} bytes are too many for a vocabulary; at most "
                f"{LARGEST_FILE:,} are read."
            )
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as a vocabulary: {error.strerror or error}."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02X}); save the file as "
            "UTF-8."
        ) from error
    if not text.strip():
        raise UserError(f"{path}: an empty file; a vocabulary needs at least one word.")
    return text
