"""`sparsight VERB`: parse, call the public function of the same name, print what came out.

Builds on every other room and holds no logic of theirs; one file a verb, or a folder where it has
verbs of its own, each with its options (the flags) and `main`. Start at `main` (main.py), then
`parse` (options.py).
"""

from sparsight.cli.main import main

__all__ = ["main"]
