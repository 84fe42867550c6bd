"""Verbs of a command: listing them, finding them, and guessing misspelt ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence

HELP = ("-h", "--help", "help")


def listed(verbs: Mapping[str, str]) -> str:
    """List verbs and what they do, one per line."""
    width = max(map(len, verbs))
    return "\n".join(f"  {verb:<{width}}  {text}" for verb, text in verbs.items())


def guess(verb: str, verbs: Iterable[str]) -> str:
    """Return a guess as a sentence after a space; empty if no verb is close."""
    import difflib  # takes a while to load, and --help does without it

    close = difflib.get_close_matches(verb, list(verbs), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def run(module: str, arguments: Sequence[str]) -> None:
    """Run the verb that a module implements."""
    importlib.import_module(f"sparsight.cli.{module}").main(arguments)
