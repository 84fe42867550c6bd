"""Answers of vision-language models: which ones are phrases, and a file that keeps them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsight.errors import SparsightError
from sparsight.files import unwritten
from sparsight.naming.vocabulary_files import same_word
from sparsight.text import LONE_SURROGATE

MOST_WORDS = 8
MOST_CHARACTERS = 100

PHRASE, NONE = "phrase", "none"
"""Kinds of good answers; all other kinds say why an answer is not a phrase."""

_MARKUP = "<>*`#[]{}|\\_="
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"))
_REFUSALS = (
    "i'm sorry", "i am sorry", "sorry", "i can't", "i cannot", "i'm unable", "i am unable",
    "i'm not able", "as an ai", "unable to", "cannot determine",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a model has said about one latent.

    Attributes:
        sae: hash of the SAE.
        images: fingerprint of the images.
        seed: seed of the images that were shown.
        latent: the latent.
        model: name of the model.
        prompt: version of the question.
        kind: `phrase`, `none`, or why the answer is not a phrase.
        phrase: the phrase; None for every other kind.
    """

    sae: str
    images: str
    seed: int
    latent: int
    model: str
    prompt: int
    kind: str
    phrase: str | None = None

    @property
    def question(self) -> tuple[object, ...]:
        """What was asked: the same question is not put twice."""
        return (self.sae, self.images, self.seed, self.latent, self.model, self.prompt)


def parse_answer(text: str) -> tuple[str, str | None]:
    """Return the kind of an answer, and its phrase if it is one.

    A phrase is one printable line of at most `MOST_WORDS` words without markup. Quotes around it
    and a full stop at its end are cut off, nothing else is changed.
    """
    line = text.strip()
    if not line:
        return "empty", None
    if len(line.splitlines()) > 1:
        return "several lines", None
    if not line.isprintable() or LONE_SURROGATE.search(line):
        return "not printable", None
    line = line.replace("’", "'") if line.casefold().startswith(("i’m", "i can’t")) else line
    if line.casefold().startswith(_REFUSALS):
        return "a refusal", None
    line = _bare(line)
    if not any(character.isalnum() for character in line):
        return "empty", None
    if line.casefold() == "none":
        return NONE, None
    if any(character in _MARKUP for character in line):
        return "markup", None
    if len(line.split()) > MOST_WORDS or len(line) > MOST_CHARACTERS:
        return f"longer than {MOST_WORDS} words or {MOST_CHARACTERS} characters", None
    return PHRASE, " ".join(line.split())


def _bare(line: str) -> str:
    while True:
        shorter = line.strip().removesuffix(".").strip()
        for left, right in _QUOTES:
            inner = shorter[1:-1]
            if len(shorter) > 2 and shorter[0] == left and shorter[-1] == right:
                shorter = inner if left not in inner and right not in inner else shorter
        if shorter == line:
            return line
        line = shorter


def distinct_phrases(answers: list[Answer]) -> list[str]:
    """Return the phrases, each once (case and blanks do not count), in the order of the latents."""
    phrases: dict[str, str] = {}
    for answer in sorted(answers, key=lambda answer: answer.latent):
        if answer.phrase is not None:
            phrases.setdefault(same_word(answer.phrase), answer.phrase)
    return list(phrases.values())


class AnswerFile:
    """A file of answers, one JSON object per line, to which each answer is added as it comes.

    If the process is killed while it writes, the last line may be cut off; it is ignored, and
    removed when the next answer is added.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[tuple[object, ...], Answer]:
        """Return the answers by question; of two answers to one question, the later.

        Raises:
            SparsightError: the file cannot be read, or a whole line is no answer.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise SparsightError(f"{self.path}: cannot be read ({error.strerror}).") from error
        answers = {}
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            answer = self._parse(line, number)
            answers[answer.question] = answer
        return answers

    def _parse(self, line: bytes, number: int) -> Answer:
        try:
            answer = Answer(**json.loads(line))
            hash(answer.question)
            has_phrase = answer.phrase is not None
            if (answer.kind == PHRASE) == has_phrase and (
                answer.phrase is None or parse_answer(answer.phrase) == (PHRASE, answer.phrase)
            ):
                return answer
        except (ValueError, TypeError, AttributeError):
            pass
        raise SparsightError(
            f"{self.path}, line {number}: is no answer of a model. Delete the line; "
            "its latent will be asked about again."
        )

    def add(self, answer: Answer) -> None:
        """Add one answer.

        Raises:
            SparsightError: the file cannot be written.
        """
        line = json.dumps(asdict(answer), ensure_ascii=False).encode() + b"\n"
        try:
            with self.path.open("a+b") as file:
                self._cut_off_half_line(file.fileno(), file.seek(0, os.SEEK_END))
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritten(self.path, error) from error

    def _cut_off_half_line(self, file: int, size: int) -> None:
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.ftruncate(file, self.path.read_bytes().rfind(b"\n") + 1)
