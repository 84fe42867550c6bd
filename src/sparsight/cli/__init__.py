"""`sparsight VERB`: parse, call the public function of the same name, print the result.

Builds on every other room and holds none of their logic. There is one file per verb, or a folder if
the verb has verbs of its own; each holds the verb's options (the flags) and `main`. Start at `main`
(main.py), then `parse` (options.py).
"""

from sparsight.cli.main import main

__all__ = ["main"]
