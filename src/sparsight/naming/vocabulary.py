"""Vocabularies: the words and short phrases that a latent may be named with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparsight.calibration.captions import BACKGROUND_TEMPLATES, WORD_TEMPLATES
from sparsight.calibration.symbols import COLOURS, PATTERNS, SYMBOLS
from sparsight.errors import UserError
from sparsight.naming.vocabulary_files import (
    Entry,
    check_entries,
    parse_table,
    read_vocabulary_file,
)
from sparsight.vision.model import VisionModel
from sparsight.vision.templates import SIMPLE, resolve_templates
from sparsight.vision.zero_shot import classifier_weights

CATEGORIES = (
    "colour",
    "texture",
    "material",
    "shape",
    "part",
    "animal",
    "plant",
    "food",
    "person",
    "object",
    "scene",
    "weather",
    "action",
    "text",
    "style",
)
"""The kinds of things that the built-in vocabularies' words stand for; a user's file may have
others."""

BUILT_IN = ("calibration", "visual")
"""Names of the vocabularies that come with Sparsight."""


@dataclass(frozen=True)
class Vocabulary:
    """Words and short phrases, each at most once, in a fixed order.

    Args:
        name: `calibration`, `visual`, or the file that it was read from.
        entries: at least one word; with its category and its own sentence where it has them.
        templates: the sentences, with `{}` for the word, whose mean embedding stands for a word
            that has no sentence of its own.

    Raises:
        UserError: there are no words, or a word is blank, repeated or not printable.
    """

    name: str
    entries: tuple[Entry, ...]
    templates: tuple[str, ...] = SIMPLE

    def __post_init__(self) -> None:
        check_entries(self.name, self.entries)
        object.__setattr__(self, "templates", resolve_templates(self.templates))

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words, as names of latents show them."""
        return tuple(entry.word for entry in self.entries)

    @cached_property
    def categories(self) -> tuple[str | None, ...]:
        """What kind of thing each word stands for; None where nobody says."""
        return tuple(entry.category for entry in self.entries)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of words, categories and sentences, in hexadecimal; the name does not count."""
        rows = [[entry.word, entry.category, list(entry.prompts)] for entry in self.entries]
        return hashlib.sha256(json.dumps([rows, self.templates]).encode()).hexdigest()

    def category_of(self, word: str) -> str | None:
        """Return the category of a word; None if it has none or the word is not in here."""
        return self._category_by_word.get(word)

    def select(self, categories: Collection[str]) -> Vocabulary:
        """Return the words of some categories, in the same order.

        Raises:
            UserError: a category has no words.
        """
        known = {category for category in self.categories if category is not None}
        unknown = sorted(set(categories) - known)
        if unknown or not categories:
            what = f"has no words of the category {unknown[0]!r}" if unknown else "no category"
            raise UserError(
                f"Vocabulary {self.name}: {what}; choose from "
                f"{', '.join(sorted(known)) or 'nothing, because its words have no categories'}."
            )
        entries = tuple(entry for entry in self.entries if entry.category in categories)
        return dataclasses.replace(self, entries=entries)

    def embed(self, model: VisionModel, batch_size: int = 256) -> Float[Tensor, "words d_embed"]:
        """Return one unit vector per word, in the space that the model's texts share with images.

        Args:
            model: a model with a text tower.
            batch_size: sentences embedded at a time.

        Raises:
            UserError: the model has no text tower.
        """
        own = [i for i, entry in enumerate(self.entries) if entry.prompts]
        if not own:
            return classifier_weights(model, self.words, self.templates, batch_size)
        vectors = _embed_prompts(model, [self.entries[i].prompts for i in own], batch_size)
        rest = [i for i, entry in enumerate(self.entries) if not entry.prompts]
        embedded = vectors.new_empty(len(self), vectors.shape[1])
        embedded[own] = vectors
        if rest:
            words = [self.words[i] for i in rest]
            embedded[rest] = classifier_weights(model, words, self.templates, batch_size)
        return embedded

    @cached_property
    def _category_by_word(self) -> dict[str, str | None]:
        return dict(zip(self.words, self.categories, strict=True))


def open_vocabulary(source: str | Path, templates: str | Iterable[str] | None = None) -> Vocabulary:
    """Open a vocabulary by its name, or read one from a file.

    Args:
        source: `calibration` (what the calibration world shows), `visual` (some 10,000 words and
            short phrases for photos), or a file: `.txt` with one word or phrase per line; `.csv`
            or `.tsv` with a column `word` and, if wanted, `category` and `prompt` (the sentence to
            embed instead of the templates').
        templates: a template set's name (`simple`, `openai80`), a template with `{}`, or several;
            default: "a photo of a {}.", or the sentences that suit the built-in vocabulary.

    Raises:
        UserError: the file is missing, empty or not UTF-8, has another suffix, or has a word that
            is blank, repeated (upper and lower case are the same), too long or not printable; the
            message names the file and the line.
    """
    if source == "calibration":
        vocabulary = calibration_vocabulary()
    elif source == "visual":
        vocabulary = visual_vocabulary()
    else:
        path = Path(source)
        if not path.suffix and not path.exists():
            raise UserError(
                f"Unknown vocabulary {str(source)!r}: it is neither {' nor '.join(BUILT_IN)} nor "
                "an existing file (.txt, .csv or .tsv)."
            )
        vocabulary = Vocabulary(str(source), tuple(read_vocabulary_file(path)))
    if templates is None:
        return vocabulary
    chosen = resolve_templates(templates if isinstance(templates, str) else tuple(templates))
    entries = tuple(Entry(entry.word, entry.category) for entry in vocabulary.entries)
    return dataclasses.replace(vocabulary, entries=entries, templates=chosen)


def calibration_vocabulary() -> Vocabulary:
    """Return everything that scenes of the calibration world may show, worded as its truth is.

    The words are those of `latents.names.wording`: symbols, words that are written, the colours of
    objects and backgrounds, and patterns. The sentences are those of several that tell scenes with
    an attribute from the others best with the calibration CLIP.
    """
    entries = [
        Entry(symbol, "object", tuple(f"a {colour} {symbol}" for colour in COLOURS))
        for symbol in SYMBOLS
    ]
    entries += [
        Entry(f"the word “{symbol}”", "text", (WORD_TEMPLATES[1].format(symbol),))
        for symbol in SYMBOLS
    ]
    entries += [Entry(f"{c} object", "colour", (f"a {c} object",)) for c in COLOURS]
    entries += [
        Entry(f"{c} background", "colour", (BACKGROUND_TEMPLATES[1].format(c),)) for c in COLOURS
    ]
    entries += [
        Entry(f"{p} pattern", "texture", (BACKGROUND_TEMPLATES[1].format(p),)) for p in PATTERNS
    ]
    return Vocabulary("calibration", tuple(entries))


def visual_vocabulary() -> Vocabulary:
    """Return some 10,000 words and short phrases for what photos show, with their categories.

    `tools/visual_vocabulary.py` made the file; its head says from what, and the licence lies beside
    it (`naming/data/LICENSE`).
    """
    text = resources.files("sparsight.naming").joinpath("data/visual.tsv").read_text("utf-8")
    rows = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    return Vocabulary("visual", tuple(parse_table("visual.tsv", rows, "\t")))


def _embed_prompts(
    model: VisionModel, prompts: Sequence[Sequence[str]], batch_size: int
) -> Float[Tensor, "words d_embed"]:
    sentences = [sentence for several in prompts for sentence in several]
    counts = torch.tensor([len(several) for several in prompts])
    vectors = classifier_weights(model, sentences, "{}", batch_size)
    words = torch.arange(len(prompts)).repeat_interleave(counts).to(vectors.device)
    sums = vectors.new_zeros(len(prompts), vectors.shape[1])
    return F.normalize(sums.index_add_(0, words, vectors), dim=-1)
