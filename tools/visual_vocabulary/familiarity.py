"""How familiar a word is: into how many tokens CLIP's tokenizer cuts it.

The tokenizer's merges are sorted by how often they occur in captions of images on the web, so a
word that is one token is one that people write under images (open_clip, MIT licence).
"""

from __future__ import annotations

import gzip
import itertools
import re
from pathlib import Path

N_MERGES = 49152 - 256 - 2


class Familiarity:
    """Cuts words like CLIP.

    Args:
        path: `bpe_simple_vocab_16e6.txt.gz`.
    """

    def __init__(self, path: Path) -> None:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        merges = lines[1 : N_MERGES + 1]
        self._ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}

    def tokens(self, word: str) -> tuple[int, int]:
        """Return the number of tokens of a word, and the rank of its rarest merge."""
        parts = [*word[:-1], f"{word[-1]}</w>"]
        rarest = 0
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, N_MERGES))
            if best not in self._ranks:
                break
            rarest = max(rarest, self._ranks[best])
            parts = _merged(parts, best)
        return len(parts), rarest

    def __call__(self, phrase: str) -> tuple[int, int]:
        """Return a key that sorts familiar phrases first: number of tokens, and rank of the rarest
        merge."""
        words = [word for word in re.split(r"[^0-9a-z]+", phrase.lower()) if word]
        if not words or not phrase.isascii():
            return (99, N_MERGES)
        counts = [self.tokens(word) for word in words]
        return (sum(n for n, _ in counts), max(rank for _, rank in counts))

    def is_familiar(self, phrase: str) -> bool:
        """Return whether each word of a phrase is one token."""
        words = [word for word in re.split(r"[^0-9a-z]+", phrase.lower()) if word]
        return all(self.tokens(word)[0] == 1 for word in words)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
