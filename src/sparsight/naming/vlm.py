"""Names by a vision-language model: it proposes phrases, and the correlation judges them.

The model sees images of one half of the collection only. On the other half each phrase is compared
with every latent, and with untrained latents, exactly as words are by the method `text`: a phrase
cannot gain from having been chosen for the very images on which it is judged.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image, ImageOps
from torch import Tensor

from sparsight.errors import UserError
from sparsight.latents import LatentIndex
from sparsight.latents.index_files import NEAR_MISSES
from sparsight.naming.image_space import ImageSpace
from sparsight.naming.null import MIN_IMAGES
from sparsight.naming.scores import N_CANDIDATES, Candidates, LatentActivations
from sparsight.naming.text import TextCorrelation
from sparsight.naming.vlm_answers import (
    NONE,
    PHRASE,
    Answer,
    AnswerFile,
    distinct_phrases,
    parse_answer,
)
from sparsight.naming.vlm_client import AskFailure, VlmClient, VlmSettings
from sparsight.naming.vocabulary import Vocabulary
from sparsight.naming.vocabulary_files import Entry
from sparsight.pages.data_uris import is_crisp
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder

ANSWERS = "naming-answers.jsonl"
"""The file of answers, beside the index."""

PROMPT_VERSION = 2
"""Changes whenever the question or its images change, so that old answers no longer count."""

PROMPT = (
    "The images of the first grid have something in common that makes one unit of a neural network "
    "active.",
    "In the images of the second grid the unit is silent. What do the images of the first grid "
    "show that those of the second do not? Answer with one short phrase of at most 8 words, in "
    "lower case, such as: yellow flower centre. If they have nothing in common, answer: none. "
    "Write nothing else.",
)

COLUMNS, CELL, GAP = 3, 224, 6
MIN_SHOWN = 4
"""Images in which a latent must fire, among those that may be shown, for a question."""

FAILURES_IN_A_ROW = 5
"""Questions without an answer in a row after which no more are asked."""


@dataclass(frozen=True)
class Answers:
    """What a model has said about latents of one SAE.

    Attributes:
        model: name of the model.
        answers: one per latent that was asked about and got any answer.
        failures: number of questions that got none, by kind of failure.
        asked: number of questions put now; the rest of the answers are from former runs.
        shown: which places of the source may be in a grid; the phrases are judged on the others.
    """

    model: str
    answers: tuple[Answer, ...]
    failures: Mapping[str, int]
    asked: int
    shown: Bool[np.ndarray, " n_places"]

    @property
    def phrases(self) -> list[str]:
        """The phrases, each once."""
        return distinct_phrases(list(self.answers))

    @property
    def without_name(self) -> Int64[np.ndarray, " latents"]:
        """Latents whose images have nothing in common, says the model."""
        return np.array([a.latent for a in self.answers if a.kind == NONE], dtype=np.int64)

    def notes(self) -> list[str]:
        """Return one line about the questions, and one per kind of useless outcome."""
        kinds = Counter(answer.kind for answer in self.answers)
        phrases, none = kinds.pop(PHRASE, 0), kinds.pop(NONE, 0)
        lines = [
            f"vlm: {self.model} asked about {self.asked:,} latents, "
            f"{len(self.answers) + sum(self.failures.values()) - self.asked:,} answers kept from "
            f"before; {phrases:,} phrases ({len(self.phrases):,} different), {none:,} times none"
        ]
        if kinds:
            lines.append(f"vlm: {kinds.total():,} answers were not a phrase: {_counted(kinds)}")
        if self.failures:
            lines.append(
                f"vlm: {sum(self.failures.values()):,} questions got no answer: "
                f"{_counted(self.failures)}; the same command asks them again"
            )
        return lines


def _counted(kinds: Mapping[str, int]) -> str:
    falling = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n:,} {kind}" for kind, n in falling)


def ask_about_latents(
    index: LatentIndex,
    settings: VlmSettings,
    seed: int = 0,
    *,
    path: Path | None = None,
    quiet: bool = False,
) -> Answers:
    """Ask a vision-language model what latents stand for.

    The latents are drawn at random from those that fire in enough images and not in all; more
    latents with the same seed include the former ones. Every answer is kept in a file as it comes,
    and no question that was answered is put again.

    Args:
        index: the index, format version 2.
        settings: the model.
        seed: seed of latents and images.
        path: file of the answers; default: `naming-answers.jsonl` beside the index.
        quiet: show no progress line.

    Raises:
        UserError: several questions in a row got no answer, or no answer was a phrase.
        SparsightError: the file of answers is damaged or cannot be written.
    """
    shown = shown_places(index, seed)
    latents = _drawn(index, shown, settings.latents, seed)
    file = AnswerFile(path or index.folder.with_name(ANSWERS))
    known, client = file.read(), VlmClient(settings)
    answers: list[Answer] = []
    failures: Counter[str] = Counter()
    asked = in_a_row = 0
    with progress("vlm", len(latents), "latents", quiet=quiet) as line:
        for latent in latents:
            blank = _question(index, seed, latent, settings.model)
            if blank.question in known:
                answers.append(known[blank.question])
            else:
                asked += 1
                try:
                    answer = _ask(client, index, shown, blank)
                except AskFailure as failure:
                    failures[failure.kind] += 1
                    in_a_row += 1
                    if in_a_row == FAILURES_IN_A_ROW:
                        raise _given_up(settings, failure, len(answers)) from None
                else:
                    in_a_row = 0
                    file.add(answer)
                    answers.append(answer)
            line.advance()
    found = Answers(settings.model, tuple(answers), dict(failures), asked, shown)
    if not found.phrases:
        about = "; ".join(found.notes()) if latents else "no latent fires in enough images"
        raise UserError(
            f"{settings.model} at {settings.url} has proposed no phrase. {about}. Try another "
            "model with --vlm-model, or leave `vlm` out."
        )
    return found


def shown_places(index: LatentIndex, seed: int) -> Bool[np.ndarray, " n_places"]:
    """Return which images may be shown: a random half of those that were read."""
    places = index.image_places
    drawn = np.random.default_rng([seed, 0x766C6D]).permutation(len(places))[: len(places) // 2]
    shown = np.zeros(index.n_places, dtype=bool)
    shown[places[drawn]] = True
    return shown


def _drawn(
    index: LatentIndex, shown: Bool[np.ndarray, " n_places"], most: int, seed: int
) -> list[int]:
    n_images = np.diff(index.by_latent.offsets)
    alive = np.nonzero(n_images >= MIN_IMAGES)[0]
    n_shown = int(shown.sum())
    drawn: list[int] = []
    for latent in np.random.default_rng([seed, 0x61736B]).permutation(alive):
        places, _ = index.firing(int(latent))
        if MIN_SHOWN <= int(shown[places].sum()) < n_shown:
            drawn.append(int(latent))
            if len(drawn) == most:
                break
    return drawn


def _question(index: LatentIndex, seed: int, latent: int, model: str) -> Answer:
    return Answer(
        index.manifest["sae"]["hash"],
        index.manifest["images"]["fingerprint"],
        seed,
        latent,
        model,
        PROMPT_VERSION,
        NONE,
    )


def _ask(
    client: VlmClient, index: LatentIndex, shown: Bool[np.ndarray, " n_places"], blank: Answer
) -> Answer:
    firing, silent = grid_places(index, shown, blank.latent, blank.seed)
    content: list[dict[str, Any]] = []
    for text, places in zip(PROMPT, (firing, silent), strict=True):
        url = _jpeg_uri(image_grid([index.picture(int(place)) for place in places]))
        content.append({"type": "text", "text": text})
        content.append({"type": "image_url", "image_url": {"url": url}})
    text = client.ask(content)
    kind, phrase = parse_answer(text)
    if client.settings.hidden(text) != text:
        kind, phrase = "repeating the key", None
    return dataclasses.replace(blank, kind=kind, phrase=phrase)


def grid_places(
    index: LatentIndex, shown: Bool[np.ndarray, " n_places"], latent: int, seed: int
) -> tuple[Int64[np.ndarray, " firing"], Int64[np.ndarray, " silent"]]:
    """Return the images of the two grids: the strongest ones, and images without the latent.

    The second grid has the latent's near misses, if the index has any, and is filled up with a
    random sample.

    Args:
        index: the index.
        shown: which places may be shown.
        latent: the latent.
        seed: seed of the sample.
    """
    places, values = index.firing(latent)
    places = places.astype(np.int64)
    own = shown[places]
    order = np.argsort(-values[own], kind="stable")[: COLUMNS**2]
    silent = shown.copy()
    silent[places] = False
    others = np.nonzero(silent)[0]
    near = [] if index.file(NEAR_MISSES) is None else index.near_misses(latent)
    close = np.array([miss.image for miss in near if silent[miss.image]], dtype=np.int64)
    others = np.setdiff1d(others, close)
    n_random = min(max(0, COLUMNS**2 - len(close)), len(others))
    random = np.random.default_rng([seed, latent]).choice(others, n_random, replace=False)
    return places[own][order], np.concatenate([close[: COLUMNS**2], random])


def image_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Return images side by side in rows of three on white, each whole and in its proportions."""
    step = CELL + GAP
    rows = -(-len(images) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * step + GAP, rows * step + GAP), "white")
    for i, image in enumerate(images):
        method = Image.Resampling.NEAREST if is_crisp(image) else Image.Resampling.LANCZOS
        cell = ImageOps.pad(image.convert("RGB"), (CELL, CELL), method, "white")
        grid.paste(cell, (GAP + i % COLUMNS * step, GAP + i // COLUMNS * step))
    return grid


def _jpeg_uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _given_up(settings: VlmSettings, failure: AskFailure, kept: int) -> UserError:
    kept_words = f" The {kept:,} answers so far are kept." if kept else ""
    return UserError(
        f"{settings.url}: {FAILURES_IN_A_ROW} questions in a row got no answer from "
        f"{settings.model}; the last one: {failure}. Check --vlm-url, --vlm-model and the key in "
        f"SPARSIGHT_VLM_KEY.{kept_words}"
    )


class VlmCorrelation(TextCorrelation):
    """Correlation of the activation with the phrases that a model has proposed.

    Every phrase is a candidate for every latent, trained or not, so the null is of the same
    procedure. Only images that were not shown count. A latent of which the model said that its
    images have nothing in common gets no name.

    Args:
        space: the collection.
        phrases: the phrases, at least one.
        vectors: one unit vector per phrase.
        centre: mean vector of many words, which is subtracted; the phrases may be too few for a
            mean of their own.
        answers: what the model has said.
        sae: the trained SAE, about which it was asked.
    """

    name: ClassVar[str] = "vlm"

    def __init__(
        self,
        space: ImageSpace,
        phrases: Sequence[str],
        vectors: Float[Tensor, "phrases d"],
        centre: Float[Tensor, " d"],
        answers: Answers,
        sae: SparseAutoencoder,
    ) -> None:
        self.centre, self.answers, self.sae = centre, answers, sae
        judged = ~answers.shown[space.places]
        rows = torch.from_numpy(np.nonzero(judged)[0])
        own = ImageSpace(space.matrix[rows], space.places[judged], space.n_places)
        super().__init__(own, phrases, vectors)

    def prepared(self, vectors: Float[Tensor, "words d"]) -> Float[Tensor, "words d"]:
        """Return the same as for `TextCorrelation`, with the given mean."""
        return self.whitened(vectors - self.centre)

    def candidates(self, activations: LatentActivations, n: int = N_CANDIDATES) -> Candidates:
        """Return the best phrases; none for latents without anything in common."""
        found = super().candidates(activations, n)
        if activations.sae is self.sae:
            nothing = np.isin(activations.latents, self.answers.without_name)
            found.word[nothing] = -1
            found.score[nothing] = -np.inf
        return found


def phrase_vocabulary(answers: Answers, templates: tuple[str, ...]) -> Vocabulary:
    """Return the phrases as a vocabulary."""
    entries = tuple(Entry(phrase) for phrase in answers.phrases)
    return Vocabulary(f"vlm:{answers.model}", entries, templates)
