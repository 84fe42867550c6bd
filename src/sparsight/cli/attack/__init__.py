"""`sparsight attack measure | find | curate`: words that fool a model, and what reads them.

A file a verb; what they share is in `shared`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsight.cli.verbs import HELP, guess, listed, run
from sparsight.errors import UserError

VERBS = {
    "measure": "how far words on pictures mislead a model, as it is or with what was found off",
    "find": "which latents or neurons respond to words, and what switching them off wins back",
    "curate": "write the pictures that drive them most, with captions and scores",
}


def main(arguments: Sequence[str]) -> None:
    """Find the verb behind `attack` and run it."""
    if not arguments or arguments[0] in HELP:
        print(_help())
        raise SystemExit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(
            f"attack: there is no {verb!r}; it has {', '.join(VERBS)}.{guess(verb, VERBS)}"
        )
    run(f"attack.{verb}", rest)


def _help() -> str:
    return (
        "usage: sparsight attack {measure,find,curate} [OPTIONS]\n\n"
        "Words on pictures: how far they fool a model, and what in it reads them.\n\n"
        f"verbs:\n{listed(VERBS)}\n\n"
        "`sparsight attack VERB --help` lists a verb's options; each writes what it finds to\n"
        "`--out`, and reads its options from `--config FILE.toml` too."
    )
