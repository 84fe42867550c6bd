"""Read the nouns of WordNet 3.0 from its database files (man 5 wndb, man 5 senseidx)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TOPICS = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon"),
    *("plant", "possession", "process", "quantity", "relation", "shape", "state", "substance"),
    "time",
)
FIRST_TOPIC = 3
"""Names of the lexicographer files of nouns; number 3 is the first of them (man 5 lexnames)."""


@dataclass(frozen=True)
class Synset:
    """A meaning.

    Attributes:
        offset: eight digits; ImageNet's `n01440764` is the synset `01440764`.
        topic: its lexicographer file, such as `noun.animal`.
        lemmas: the words for it, with `_` for blanks, the most usual one first.
        hypernyms: offsets of more general meanings.
    """

    offset: str
    topic: str
    lemmas: tuple[str, ...]
    hypernyms: tuple[str, ...]


class WordNet:
    """All nouns.

    Args:
        folder: with `data.noun` and `index.noun`.
    """

    def __init__(self, folder: Path) -> None:
        self.synsets = {s.offset: s for s in _synsets(folder / "data.noun")}
        self._senses = dict(_senses(folder / "index.noun"))

    def ancestors(self, offset: str) -> set[str]:
        """Return the meaning itself and everything more general."""
        reached: set[str] = set()
        waiting = [offset]
        while waiting:
            offset = waiting.pop()
            if offset not in reached:
                reached.add(offset)
                waiting.extend(self.synsets[offset].hypernyms)
        return reached

    def most_usual(self, lemma: str) -> Synset:
        """Return the meaning in which a word is used most often."""
        return self.synsets[self._senses[lemma.lower()][0]]

    def topics(self, lemma: str) -> set[str]:
        """Return the topics of all meanings of a word."""
        return {self.synsets[offset].topic for offset in self._senses[lemma.lower()]}

    @cached_property
    def taxa(self) -> set[str]:
        """Scientific names of genera, families and other `taxonomic groups`."""
        root = self.most_usual("taxonomic_group").offset
        groups = [s for offset, s in self.synsets.items() if root in self.ancestors(offset)]
        names = {lemma.removeprefix("genus_") for group in groups for lemma in group.lemmas}
        return {name for name in names if name[0].isupper()}


def _synsets(path: Path) -> Iterator[Synset]:
    for line in path.read_text("latin-1").splitlines():
        if line.startswith(" "):
            continue  # the licence
        fields = line.partition("|")[0].split()
        count = int(fields[3], 16)
        at = 4 + 2 * count
        pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
        yield Synset(
            offset=fields[0],
            topic=f"noun.{TOPICS[int(fields[1]) - FIRST_TOPIC]}",
            lemmas=tuple(fields[4:at:2]),
            hypernyms=tuple(p[1] for p in pointers if p[0] in ("@", "@i") and p[2] == "n"),
        )


def _senses(path: Path) -> Iterator[tuple[str, list[str]]]:
    for line in path.read_text("latin-1").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            yield fields[0], fields[-int(fields[2]) :]
