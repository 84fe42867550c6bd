"""An SAE on disk: `config.json`, `sae.safetensors` and `README.md`; nothing is pickled."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sparsight.config import from_dict, to_dict
from sparsight.errors import SparsightError, UserError
from sparsight.figures import figure_of, is_number
from sparsight.files import check_replaceable, read_json, write_json, write_text
from sparsight.folders import replaced, settled
from sparsight.pickles import shown
from sparsight.reading import LONGEST_CONFIG
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.card import model_card
from sparsight.sae.config import SAEConfig
from sparsight.tensor_files import (
    read_safetensors,
    safetensors_metadata,
    sha256_tensors,
    write_safetensors,
)

FORMAT = "sparsight-sae"
FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
"""Version 1 had no transcoders, and only sparsities that keep the k largest."""
CONFIG = "config.json"
WEIGHTS = "sae.safetensors"
README = "README.md"
METRICS, LOG = "metrics.json", "metrics.jsonl"
"""What may lie beside an SAE: what `evaluate` measured, and the log of its training."""
LONGEST_LINE = 1 << 16
"""Bytes of the end of a log that are looked through for its last line."""
FILES = (CONFIG, WEIGHTS, README)
"""The files in the folder of an SAE."""
SHA256 = "sha256"
"""The key, in the metadata of `WEIGHTS`, of the checksum over the tensors; see `sha256_tensors`."""
SHA256_DIGITS = 64
SHOWN = 12
"""Largest number of tensors that a message names."""
_KEYS = {"format", "format_version", "d_in", "config", "metadata"}
_OPTIONAL = {"d_out"}


def save(sae: SparseAutoencoder, folder: Path) -> Path:
    """Write an SAE into a folder; its files replace those of an existing SAE in one step.

    If the process is killed or the disk is full, the folder holds either the old SAE or the new
    one.

    Returns:
        The folder.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in sae.state_dict().items()
    }
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "d_in": sae.d_in,
        **({"d_out": sae.d_out} if sae.is_transcoder else {}),
        "config": to_dict(sae.config),
        "metadata": sae.metadata,
    }
    check_replaceable(folder / CONFIG, FORMAT, "an SAE")
    with replaced(folder, FILES) as staged:
        write_safetensors(tensors, staged / WEIGHTS, {SHA256: sha256_tensors(tensors)})
        write_json(staged / CONFIG, description)
        write_text(staged / README, model_card(sae).text())
    return folder


def is_own(folder: Path) -> bool:
    """Return whether a folder holds an SAE that Sparsight wrote.

    Raises:
        SparsightError: its `config.json` is damaged or far too large.
    """
    settled(folder)
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        return False
    size = (folder / CONFIG).stat().st_size
    if size > LONGEST_CONFIG:
        raise SparsightError(f"{folder / CONFIG}: is not a configuration; it has {size:,} bytes.")
    return "format" in read_json(folder / CONFIG)


def load_own(folder: Path) -> SparseAutoencoder:
    """Read an SAE that Sparsight wrote, on the CPU.

    Raises:
        UserError: this Sparsight does not read the version of `config.json`.
        SparsightError: a file is missing or damaged.
    """
    while True:
        before = _identity(folder / CONFIG)
        try:
            sae = _read_own(folder)
        except SparsightError:
            if _identity(folder / CONFIG) == before:
                raise
        else:
            # Another SAE replaced it between the two files: read that one.
            if _identity(folder / CONFIG) == before:
                sae.loaded_from = folder
                return sae


def known_fvu(folder: Path) -> tuple[float | None, str]:
    """The FVU of the SAE in a run's folder, and whether it was measured or logged in training.

    None where the folder does not tell, where `metrics.json` is about another SAE, or where a file
    cannot be read: then whatever else needs the file says so.
    """
    fvu = figure_of("fvu")
    with suppress(SparsightError, OSError, ValueError):
        metrics = read_json(folder / METRICS)
        own = safetensors_metadata(folder / WEIGHTS).get(SHA256)
        if metrics.get("sae", own) == own and is_number(fvu.of(metrics)):
            return float(fvu.of(metrics)), "measured"
    for line in reversed(_end_of(folder / LOG)):
        with suppress(ValueError):  # the last one may have been cut off
            value = fvu.of(json.loads(line))
            return (float(value), "in training") if is_number(value) else (None, "")
    return None, ""


def _end_of(path: Path) -> list[str]:
    """The last lines of a log; [] where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - LONGEST_LINE))
            return file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return []


def _identity(path: Path) -> tuple[int, ...]:
    """Return what differs once another file has replaced this one."""
    try:
        about = path.stat()
    except OSError:
        return ()
    return about.st_dev, about.st_ino, about.st_mtime_ns


def _read_own(folder: Path) -> SparseAutoencoder:
    description = _description(folder / CONFIG)
    d_in = description["d_in"]
    config = from_dict(SAEConfig, description["config"], str(folder / CONFIG))
    try:
        sae = SparseAutoencoder(
            d_in,
            config,
            d_out=description.get("d_out"),
            blank=True,
            metadata=description["metadata"],
        )
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        # torch's message about tensors that no machine can hold.
        reason = str(error).partition("\n")[0]
        raise SparsightError(
            f"{folder / CONFIG}: an SAE of d_in {shown(d_in)} and n_latents "
            f"{shown(config.n_latents)} cannot be made ({reason})."
        ) from error
    tensors = _tensors(folder / WEIGHTS, sae)
    if all(tensor.dtype == torch.float64 for tensor in tensors.values()):
        sae = sae.double()
    sae.load_state_dict(tensors)
    return sae.requires_grad_(False).eval()


def _description(path: Path) -> dict[str, Any]:
    description = read_json(path)
    version = description.get("format_version")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path}: is not the configuration of a Sparsight SAE (it has no such format)."
        )
    if version not in READ_VERSIONS:
        raise UserError(
            f"{path}: format_version is {shown(version)}; this Sparsight reads "
            f"{' and '.join(map(str, READ_VERSIONS))}."
        )
    strange, absent = sorted(set(description) - _KEYS - _OPTIONAL), sorted(_KEYS - set(description))
    if strange or absent:
        raise UserError(f"{path}: unknown keys {strange}, missing keys {absent}.")
    if not isinstance(description["d_in"], int) or description["d_in"] < 1:
        raise UserError(
            f"{path}: d_in is {shown(description['d_in'])}; expected a positive number."
        )
    if not isinstance(description.get("d_out", 1), int) or description.get("d_out", 1) < 1:
        raise UserError(
            f"{path}: d_out is {shown(description['d_out'])}; expected a positive number."
        )
    for key in ("config", "metadata"):
        if not isinstance(description[key], dict):
            raise UserError(f"{path}: {key} is {shown(description[key])}; expected an object.")
    return description


def _tensors(path: Path, sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    tensors = read_safetensors(path)
    _check_sum(path, tensors)
    expected = {key: tuple(tensor.shape) for key, tensor in sae.state_dict().items()}
    actual = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if expected != actual:
        differing = sorted(
            key for key in {*expected, *actual} if expected.get(key) != actual.get(key)
        )
        raise SparsightError(
            f"{path}: tensors do not fit config.json (d_in, d_out, n_latents, sparsity, tied, …): "
            + "; ".join(
                f"{key[:60]} is {actual.get(key, 'missing')}, "
                f"expected {expected.get(key, 'nothing')}"
                for key in differing[:SHOWN]
            )
            + "."
        )
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise SparsightError(f"{path}: {key} is of {tensor.dtype}; expected real numbers.")
        if not torch.isfinite(tensor).all():
            raise SparsightError(f"{path}: {key} holds values that are not finite.")
    return tensors


def _check_sum(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare tensors with the checksum beside them; files of earlier versions have none.

    Raises:
        SparsightError: they differ.
    """
    about = safetensors_metadata(path)
    # The name of the checksum may be what was altered.
    if SHA256 not in about and not any(len(text) == SHA256_DIGITS for text in about.values()):
        return
    if about.get(SHA256) != sha256_tensors(tensors):
        raise SparsightError(
            f"{path}: its checksum differs, so the file was altered or damaged since it was "
            "written. Fetch it again from where it came, or take it from a checkpoint of its run."
        )
