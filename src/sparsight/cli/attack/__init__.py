"""`sparsight attack measure | find | curate`: typographic attacks, and what in a model reads words.

There is one file per verb; what the verbs share is in `shared`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsight.cli.verbs import HELP, guess, listed, run
from sparsight.errors import UserError

VERBS = {
    "measure": "how far words in images mislead a model, also with latents switched off",
    "find": "which latents or neurons respond to words, and what switching them off restores",
    "curate": "write the images that most activate what was found, with captions and scores",
}


def main(arguments: Sequence[str]) -> None:
    """Find the verb after `attack` and run it."""
    if not arguments or arguments[0] in HELP:
        print(_help())
        raise SystemExit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(
            f"attack: unknown verb {verb!r}; choose {', '.join(VERBS)}.{guess(verb, VERBS)}"
        )
    run(f"attack.{verb}", rest)


def _help() -> str:
    return (
        "usage: sparsight attack {measure,find,curate} [OPTIONS]\n\n"
        "Typographic attacks: how far words in images fool a model, and what reads the words.\n\n"
        f"verbs:\n{listed(VERBS)}\n\n"
        "`sparsight attack VERB --help` lists a verb's options. Each verb writes its results to\n"
        "`--out`, and also reads its options from `--config FILE.toml`."
    )
