"""Checkpoints of projects that read them nowhere else: our outputs are those of their formulas."""

from __future__ import annotations

import json

import pytest
import torch
from foreign_files import (
    CASES,
    LLAMASCOPIUM,
    D,
    K,
    N,
    case,
    dncbm_file,
    layer_norm,
    llamascopium_folder,
    llamascopium_state,
    msae_file,
    msae_state,
    numbers,
    openai_file,
    parts,
    prisma_folder,
    prisma_state,
    saev_activation,
    saev_file,
)

from sparsight.errors import SparsightError, UserError
from sparsight.sae.formats import read


def vectors(massive: bool) -> torch.Tensor:
    """Activations; with a few dimensions a hundred times as large, as in the residual stream."""
    x = numbers(64, D, seed=20)
    x[:, 2] *= 100 if massive else 1
    return x + (5 if massive else 0.3)


@torch.no_grad()
@pytest.mark.parametrize("massive", [False, True], ids=["normal", "massive"])
@pytest.mark.parametrize("name", CASES)
def test_codes_and_outputs_are_those_of_the_projects_own_formulas(name, massive, tmp_path):
    path, function = CASES[name](tmp_path)
    foreign = read(path)
    assert foreign.unknown == ()
    x = vectors(massive)
    codes, expected = function(x)
    code = foreign.build().encode(x)
    found = code.dense()
    if "times the norms" in " ".join(foreign.notes):
        codes = codes * parts()[2].norm(dim=1)
    scale = codes.abs().max()
    torch.testing.assert_close(found / scale, codes / scale, rtol=1e-5, atol=2e-6)
    out = foreign.build()(x).x_hat
    scale = expected.abs().max()
    torch.testing.assert_close(out / scale, expected / scale, rtol=2e-5, atol=2e-6)
