"""`sparsight evaluate`: measure an SAE beside its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.cli.options import parse
from sparsight.cli.printing import print_scores
from sparsight.cli.subject import SubjectOptions, Subjects, open_saes
from sparsight.errors import UserError
from sparsight.evaluation import evaluate
