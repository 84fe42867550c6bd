"""Checkpoints in half precision: the numbers are those of the file, all arithmetic is float32."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreign_files import CASES, D, N
from sparsight.errors import SparsightError
from sparsight.formats import find, read
from sparsight.sae import (
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Normaliser,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

WRITTEN = {
    "saelens": JumpReLU(),
    "sparsify": GroupMax(3),
    "visaebench": BatchTopK(4),
    "dictionary_learning": BatchTopK(4),
    "overcomplete": TopK(4),
    "saev": BatchTopK(4),
    "prisma": Gated(),
}


def _changed(data: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(data, torch.Tensor):
        return change(data) if data.dtype == torch.float32 else data
    if isinstance(data, dict):
        return type(data)((key, _changed(each, change)) for key, each in data.items())
    return data


def _rewrite(file: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Change the float32 tensors of a file; False where torch does not read it as plain data."""
    if file.suffix == ".safetensors":
        save_file(_changed(load_file(file), change), file)
        return True
    data = file.read_bytes()
    line = data[: data.index(b"\n") + 1] if data.startswith(b"{") else b""
    try:
        plain = torch.load(io.BytesIO(data[len(line) :]), weights_only=True)
    except Exception:  # classes of the project, or gzip
        return False
    buffer = io.BytesIO()
    torch.save(_changed(plain, change), buffer)
    file.write_bytes(line + buffer.getvalue())
    return True


def _pairs(path: Path, folder: Path, dtype: torch.dtype) -> list[SparseAutoencoder]:
    """The SAE of a checkpoint cast to a dtype, and of one with the same numbers in float32."""
    found = []
    for name, change in {
        "half": lambda each: each.to(dtype),
        "full": lambda each: each.to(dtype).float(),
    }.items():
        copied = folder / name / path.parent.name
        shutil.copytree(path.parent if path.is_file() else path, copied)
        weights = [
            each
            for each in copied.rglob("*")
            if each.suffix in (".pt", ".pth", ".safetensors", ".gz")
        ]
        if not all(_rewrite(each, change) for each in weights):
            pytest.skip("torch does not read it as plain data")
        found.append(read(copied / path.name if path.is_file() else copied).build())
    return found


def _assert_equal(half: SparseAutoencoder, full: SparseAutoencoder) -> None:
    for name, each in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], each), name


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_in_half_precision_reads_as_the_same_numbers_in_float32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    path, _ = CASES[name](made)
    _assert_equal(*_pairs(path, tmp_path, dtype))


def _sae(sparsity: Any, normaliser: str = "scale") -> SparseAutoencoder:
    config = SAEConfig(N, sparsity=sparsity, normaliser=normaliser, unit_norm_decoder=False)
    units = (
        Normaliser(torch.full((D,), 0.3), torch.tensor([1.7])) if normaliser == "scale" else None
    )
    sae = SparseAutoencoder(D, config, normaliser=units)
    generator = torch.Generator().manual_seed(1)
    for each in (*sae.parameters(), *sae.weights().extra.values()):
        each.data += 0.1 * torch.rand(each.shape, generator=generator)
    return sae.requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("format", WRITTEN)
def test_what_sparsight_wrote_reads_the_same_once_it_is_cast(
    format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sae = _sae(WRITTEN[format], "none" if format == "overcomplete" else "scale")
    if format == "overcomplete":
        sae.b_dec.zero_()
    if format == "saev":
        sae.b_enc.zero_()
    path = find(format).save(sae, tmp_path / "made")
    _assert_equal(*_pairs(path, tmp_path, dtype))


@pytest.mark.parametrize("format", WRITTEN)
def test_an_sae_in_half_precision_is_written_as_its_float32_copy(
    format: str, tmp_path: Path
) -> None:
    sae = _sae(WRITTEN[format], "none" if format == "overcomplete" else "scale").bfloat16()
    if format == "overcomplete":
        sae.b_dec.zero_()
    full = SparseAutoencoder(D, sae.config, blank=True)
    full.load_state_dict(sae.state_dict())
    _assert_equal(
        *(
            read(find(format).save(each, tmp_path / name)).build()
            for name, each in {"half": sae, "full": full}.items()
        )
    )


def test_numbers_of_eight_bits_are_still_refused(tmp_path: Path) -> None:
    path = find("sparsify").save(_sae(TopK(4)), tmp_path)
    file = path / "sae.safetensors"
    tensors = load_file(file)
    tensors["W_dec"] = tensors["W_dec"].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(SparsightError, match="W_dec is of float8"):
        read(path).build()
