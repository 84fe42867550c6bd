"""Find phrases that a native speaker would stumble over, and say what to write instead.

`python tools/english.py` reads the sources, the documentation and the names of the tests, prints
one line per phrase that it finds (`file:line: 'phrase': write …`) and exits with 1 if it finds any.
The list is short on purpose: a phrase belongs here only if it is wrong wherever it stands. What is
right in one place all the same is in `EXCEPTIONS`, with the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
READ = ("src", "docs", "tests", "recipes", "tools")
ALSO_READ = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
ENDINGS = frozenset({".py", ".md", ".toml", ".jinja"})

_NOUNS = (
    "autoencoder|bin|block|caption|class|column|command|dimension|family|file|folder|format|image|kind"
    "|label|latent|layer|member|metric|model|name|package|patch|picture|pixel|place|point|position"
    "|processor|quantile|recipe|row|run|scene|set|setting|shard|site|step|store|text|token|value"
    "|vector|verb|view|word"
)
_NOT_COUNTED = (
    "at|by|for|from|in|into|is|of|on|or|than|that|to|was|when|where|which|who|with|as|and|but|not"
)


@dataclass(frozen=True)
class Pattern:
    """A phrase to avoid.

    Attributes:
        phrase: a regular expression; a blank stands for any blanks, line breaks and marks of
            comments between two words.
        instead: what to write.
        files: where it is looked for, as a glob; by default everywhere.
        example: a sentence that has it, for the test.
    """

    phrase: str
    instead: str
    example: str
    files: str = "*"

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """The phrase, compiled; words may be parted by the end of a line or of a literal."""
        return re.compile(self.phrase.replace(" ", r'(?:[\s#]|["\']\s+f?["\'])+'))


@dataclass(frozen=True)
class Found:
    """A phrase that somebody wrote."""

    file: str
    line: int
    text: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text!r}: write {self.instead}"


PATTERNS = (
    Pattern(
        rf"\b(?:[Aa]n?|[Oo]ne) (?!(?:{_NOT_COUNTED})\b)[a-z]+ an? (?:{_NOUNS})\b(?!-)",
        "“one X per Y”",
        "Train one autoencoder a site.",
    ),
    Pattern(r'"""Of\b', "what it is: “The seed of …”, “Return …”", '    """Of the weights."""'),
    Pattern(
        r"\b[Tt]here (?:is|are) no such\b",
        "what does not exist: “unknown remedy 'x'; choose a or b”",
        "The latent does not exist: there is no such.",
    ),
    Pattern(r"\b[Aa]new\b", "“again”, or “new”", "Find them anew."),
    Pattern(r"\bby lot\b", "“at random”", "Half of them are drawn by lot."),
    Pattern(
        r"\bfor who\b|\bto who\b",
        "“for those who”, or name the actor",
        "It is kept for who reads it.",
    ),
    Pattern(r"\b[Ww]hoever\b", "the actor: “the user”, “a process that …”", "Whoever stops it."),
    Pattern(r"\b[Aa]ll that\b", "“everything that”, or the noun", "All that a run needs."),
    Pattern(r"\bbefell\b|\bbefalls\b", "what happened: “diverged”", "the member that it befell"),
    Pattern(
        r"\b(?:can|could|cannot|to|may|might) (?:not )?be had\b|\bis (?:not )?to be had\b",
        "“is available”, “exists”, “is possible”",
        "Heatmaps can be had.",
    ),
    Pattern(
        r"\b[Nn]ot one (?:image|picture|vector|latent|file|caption|row|member|store|run)\b",
        "“no images”",
        "There is not one image in it.",
    ),
    Pattern(
        r"\b(?:is|are|was|were|be) told\b",
        "“reported”, “distinguished”, “the message says”",
        "Broken files are told at the end.",
    ),
    Pattern(
        r"\b[Ss]o many\b(?! (?:\w+ )?(?:that|as)\b)|\b[Aa]t least so (?:much|many)\b",
        "the number: “this many”, “`n` images”",
        "Read so many images.",
    ),
    Pattern(
        r"\bprocessor but one\b|\bbehind the last block but one\b",
        "“minus one”, “the penultimate block”",
        "One worker per processor but one.",
    ),
    Pattern(
        r"\b[Pp]ictures?\b(?![\w(.\]]|/latent| of the latents?\b)",
        "“images”: they are data",
        "Load pictures in order.",
        "src/*",
    ),
)

EXCEPTIONS = (
    # (files, phrase as it was found, why it may stay)
    ("tools/english.py", "*", "the list itself"),
    ("tests/test_english.py", "*", "quotes the phrases"),
    ("src/sparsight/calibration/captions.py", "?icture*", "captions that CLIP was trained on"),
    ("src/sparsight/images/columns.py", "picture", "the name of a column"),
    ("src/sparsight/compat/clipscope.py", "pictures", "the name of a public argument"),
    ("src/sparsight/publishing/*", "?icture*", "drawings of a latent, one PNG each; a public name"),
    ("src/sparsight/pages/*", "picture", "an image scaled for a page; names of variables"),
    ("src/sparsight/latents/cards.py", "picture*", "images scaled for a page; names of variables"),
    ("src/sparsight/finetuning/report.py", "picture", "a key of the page's template"),
    ("src/sparsight/latents/[hirs]*.py", "picture*", "public names, and those of cards.py"),
    ("src/sparsight/cli/finetune.py", "pictures", "the name of an option"),
    ("src/sparsight/cli/search.py", "picture", "the old name of an option"),
    ("src/sparsight/attacks/salience*.py", "pictures", "a key of salience.json"),
)


def phrases_in(text: str, file: str) -> Iterator[Found]:
    """The phrases to avoid in the text of a file, in the order of the list."""
    for pattern in PATTERNS:
        if not fnmatch(file, pattern.files):
            continue
        for match in pattern.expression.finditer(text):
            phrase = " ".join(match[0].split())
            if not _is_exception(file, phrase):
                yield Found(file, text.count("\n", 0, match.start()) + 1, phrase, pattern.instead)


def phrases_in_tree(root: Path = ROOT) -> list[Found]:
    """The phrases to avoid in a checkout, apart from `EXCEPTIONS`; sorted by place."""
    found: list[Found] = []
    for path in _files(root):
        file = path.relative_to(root).as_posix()
        found += phrases_in(_readable(path), file)
    return sorted(found, key=lambda each: (each.file, each.line))


def _files(root: Path) -> Iterator[Path]:
    for name in ALSO_READ:
        if (root / name).exists():
            yield root / name
    for name in READ:
        for path in sorted((root / name).rglob("*")):
            if path.suffix in ENDINGS and path.is_file():
                yield path


def _readable(path: Path) -> str:
    """The text of a file: names of tests as sentences, and a changelog without past releases."""
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":
        unreleased = re.match(r"(?s).*?^## .*?(?=^## |\Z)", text, re.MULTILINE)
        return unreleased[0] if unreleased else text
    if path.name.startswith("test_"):
        return re.sub(r"def test_\w+", lambda name: name[0].replace("_", " "), text)
    return text


def _is_exception(file: str, phrase: str) -> bool:
    return any(fnmatch(file, files) and fnmatch(phrase, like) for files, like, _ in EXCEPTIONS)


def main() -> int:
    """Print what was found; 1 if it was anything."""
    found = phrases_in_tree()
    for each in found:
        print(each)
    if found:
        print(f"\n{len(found)} phrases to rewrite; exceptions belong in tools/english.py.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
