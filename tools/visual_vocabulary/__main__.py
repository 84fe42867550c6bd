"""Make the visual vocabulary: `python -m tools.visual_vocabulary WORDNET TIMM OPEN_CLIP`.

WORDNET is the folder with WordNet 3.0's `data.noun` and `index.noun` (Debian's package wordnet-base
1:3.0-37 puts them into /usr/share/wordnet), TIMM and OPEN_CLIP are the wheels that
`pip download --no-deps timm==1.0.31 open_clip_torch==3.3.0` fetches. The same input makes the same
file.

The phrases of `phrases.txt` come first. Then come nouns of WordNet that ImageNet's 12k synsets
(those with most images) name, the most familiar ones first, until there are `N_WORDS`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsight.naming.vocabulary import CATEGORIES
from sparsight.naming.vocabulary_files import parse_table
from tools.visual_vocabulary.familiarity import Familiarity
from tools.visual_vocabulary.phrases import HERE, left_out, phrases
from tools.visual_vocabulary.wordnet import Synset, WordNet

TARGET = HERE.parents[1] / "src" / "sparsight" / "naming" / "data" / "visual.tsv"
N_WORDS = 10_000
SYNSETS = "timm/data/_info/imagenet12k_synsets.txt"
MERGES = "open_clip/bpe_simple_vocab_16e6.txt.gz"

TOPICS = {
    "noun.act": "action",
    "noun.animal": "animal",
    "noun.artifact": "object",
    "noun.attribute": "texture",
    "noun.body": "part",
    "noun.communication": "object",
    "noun.food": "food",
    "noun.location": "scene",
    "noun.object": "object",
    "noun.phenomenon": "weather",
    "noun.plant": "plant",
    "noun.shape": "shape",
    "noun.substance": "material",
}
"""Category by topic of WordNet; nouns of other topics, such as persons, are left out."""

ANCESTORS = {
    "04956594": "colour",  # colour
    "03309808": "material",  # fabric
    "13086908": "part",  # plant part
    "05220461": "part",  # body part
    "03892891": "part",  # part of an artefact
    "03081021": "part",  # component
    "04105893": "scene",  # room
    "03953020": "scene",  # place of business
    "03748162": "scene",  # shop
    "04081281": "scene",  # restaurant
    "03315023": "scene",  # facility: airport, stadium
    "04096066": "scene",  # road
    "03899328": "scene",  # path
    "03899768": "scene",  # patio
    "08673395": "scene",  # tract of land
    "09287968": "scene",  # geological formation
    "09225146": "scene",  # body of water
}
"""Category by an ancestor, which counts more than the topic."""

UNSEEN = {
    "01326291": "microorganism",
    "03247620": "drug",
    "14070360": "disease",
}
"""Ancestors whose descendants no photo shows, or should be named from one."""


def category_of(synset: Synset, ancestors: set[str]) -> str | None:
    """Return the category of a meaning; None if it does not belong into the vocabulary."""
    if synset.topic not in TOPICS or ancestors & set(UNSEEN):
        return None
    for offset, category in ANCESTORS.items():
        if offset in ancestors and synset.topic != "noun.food":
            return category
    return TOPICS[synset.topic]


def nouns(
    wordnet: WordNet, offsets: list[str], familiarity: Familiarity
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Return words with categories, the most familiar first, and why others were left out."""
    banned = left_out()
    reasons: Counter[str] = Counter()
    kept: dict[str, tuple[tuple[int, int], str]] = {}
    for offset in offsets:
        synset = wordnet.synsets[offset]
        category = category_of(synset, wordnet.ancestors(offset))
        if category is None:
            reasons["of a topic that is left out"] += 1
            continue
        if any(_is_banned(lemma, banned) for lemma in synset.lemmas[:1]):
            reasons["with a word that is left out"] += 1
            continue
        lemmas = [
            lemma
            for lemma in synset.lemmas
            if not _is_banned(lemma, banned)
            and _means(lemma, synset, wordnet)
            and lemma.partition("_")[0] not in wordnet.taxa
        ]
        if not lemmas:
            reasons["whose words usually mean something else"] += 1
            continue
        lemma = next(filter(familiarity.is_familiar, lemmas), lemmas[0])
        word = lemma.replace("_", " ")
        if word in kept:
            reasons["whose word another has"] += 1
            continue
        if synset.topic == "noun.plant" and "noun.food" in wordnet.topics(lemma):
            category = "food"  # an olive, not its part of the tree
        kept[word] = (familiarity(lemma), category)
    ranked = sorted(kept, key=lambda word: (kept[word][0], word))
    return [(word, kept[word][1]) for word in ranked], reasons


def _is_banned(lemma: str, banned: set[str]) -> bool:
    if f"={lemma.lower()}" in banned:
        return True
    parts = re.split(r"[_' -]+", lemma.lower())
    return any(part in banned or part.removesuffix("s") in banned for part in parts)


def _means(lemma: str, synset: Synset, wordnet: WordNet) -> bool:
    usual = wordnet.most_usual(lemma)
    return usual == synset or (
        usual.topic == synset.topic and usual.offset in wordnet.ancestors(synset.offset)
    )


def combined(
    written: list[tuple[str, str]], found: list[tuple[str, str]], n_words: int
) -> list[tuple[str, str]]:
    """Return the first `n_words` different words; the first category of a word counts."""
    rows: dict[str, tuple[str, str]] = {}
    for word, category in written + found:
        if category not in CATEGORIES:
            raise ValueError(f"{word!r}: unknown category {category!r}")
        rows.setdefault(word.casefold(), (word, category))
    return list(rows.values())[:n_words]


def head(n_written: int, n_found: int, inputs: dict[str, str]) -> str:
    """Return the comment at the top of the file."""
    lines = [
        "Sparsight's visual vocabulary: what photos show, in words and short phrases.",
        "Made by `python -m tools.visual_vocabulary`; do not edit. Licence: LICENSE beside it.",
        f"{n_written:,} were written for Sparsight (MIT); {n_found:,} are nouns of WordNet 3.0,",
        "Copyright 2006 by Princeton University, that ImageNet's 12k synsets (list of timm) name.",
        *(f"{name}: SHA-256 {digest}" for name, digest in inputs.items()),
    ]
    return "".join(f"# {line}\n" for line in lines)


def main() -> None:
    """Read the sources, and write the vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wordnet", type=Path)
    parser.add_argument("timm", type=Path)
    parser.add_argument("open_clip", type=Path)
    parser.add_argument("--out", type=Path, default=TARGET)
    given = parser.parse_args()
    written = list(phrases((HERE / "phrases.txt").read_text("utf-8")))
    with TemporaryDirectory() as folder:
        synsets = Path(zipfile.ZipFile(given.timm).extract(SYNSETS, folder))
        merges = Path(zipfile.ZipFile(given.open_clip).extract(MERGES, folder))
        inputs = {
            "wordnet data.noun": _digest(given.wordnet / "data.noun"),
            "wordnet index.noun": _digest(given.wordnet / "index.noun"),
            SYNSETS: _digest(synsets),
            MERGES: _digest(merges),
        }
        offsets = [line.removeprefix("n") for line in synsets.read_text().split()]
        found, reasons = nouns(WordNet(given.wordnet), offsets, Familiarity(merges))
    own = combined(written, [], len(written))
    rows = combined(written, found, N_WORDS)
    body = "word\tcategory\n" + "".join(f"{word}\t{category}\n" for word, category in rows)
    parse_table(str(given.out), body, "\t")
    top = head(len(own), len(rows) - len(own), inputs)
    given.out.write_text(top + body, encoding="utf-8", newline="\n")
    report = [f"{len(rows):,} words, {len(own):,} of them written for Sparsight"]
    report += [f"  {count:,} {name}" for name, count in Counter(c for _, c in rows).most_common()]
    report += [f"  left out: {count:,} {why}" for why, count in reasons.most_common()]
    report += [f"  left out: {len(own) + len(found) - len(rows):,} repeated or least familiar"]
    print("\n".join(report), file=sys.stderr)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
