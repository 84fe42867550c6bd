"""An SAE on disk: `config.json`, `sae.safetensors`, `README.md`; nothing pickled."""

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
"""Version 1 had no transcoders, and no other sparsities than those of the k largest."""
CONFIG = "config.json"
WEIGHTS = "sae.safetensors"
README = "README.md"
METRICS, LOG = "metrics.json", "metrics.jsonl"
"""What may lie beside an SAE: what `evaluate` measured, and the log of its training."""
LONGEST_LINE = 1 << 16
"""Bytes of the end of a log that are looked through for its last line."""
FILES = (CONFIG, WEIGHTS, README)
"""What a folder of an SAE holds."""
SHA256 = "sha256"
"""The key, in the metadata of `WEIGHTS`, of a checksum over the tensors; see `sha256_tensors`."""
SHA256_DIGITS = 64
SHOWN = 12
"""Tensors that a message names."""
_KEYS = {"format", "format_version", "d_in", "config", "metadata"}
_OPTIONAL = {"d_out"}


def save(sae: SparseAutoencoder, folder: Path) -> Path:
    """Write an SAE into a folder; its files take the place of an SAE that is there at once.

    Killed at any point, or on a disk that it does not fit on, the SAE there is the old or the new.

    Returns:
        The folder.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    tensors = {
        name: each.detach().cpu().contiguous().clone() for name, each in sae.state_dict().items()
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
    """Whether a folder holds an SAE that Sparsight wrote.

    Raises:
        SparsightError: its `config.json` is damaged or far too large.
    """
    settled(folder)
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        return False
    size = (folder / CONFIG).stat().st_size
    if size > LONGEST_CONFIG:
        raise SparsightError(f"{folder / CONFIG}: is no configuration; it has {size:,} bytes.")
    return "format" in read_json(folder / CONFIG)


def load_own(folder: Path) -> SparseAutoencoder:
    """Read an SAE that Sparsight wrote, on the CPU.

    Raises:
        UserError: `config.json` is not of a version that this Sparsight reads.
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
            # Else another SAE took its place between the two files: read that.
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
    """What differs when another file has taken the place of this one."""
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
        # What torch says of tensors that no machine can hold.
        told = str(error).partition("\n")[0]
        raise SparsightError(
            f"{folder / CONFIG}: an SAE of d_in {shown(d_in)} and n_latents "
            f"{shown(config.n_latents)} cannot be made ({told})."
        ) from error
    tensors = _tensors(folder / WEIGHTS, sae)
    if all(each.dtype == torch.float64 for each in tensors.values()):
        sae = sae.double()
    sae.load_state_dict(tensors)
    return sae.requires_grad_(False).eval()


def _description(path: Path) -> dict[str, Any]:
    found = read_json(path)
    version = found.get("format_version")
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: is not the configuration of a Sparsight SAE (no such format).")
    if version not in READ_VERSIONS:
        raise UserError(
            f"{path}: format_version is {shown(version)}; this Sparsight reads "
            f"{' and '.join(map(str, READ_VERSIONS))}."
        )
    strange, absent = sorted(set(found) - _KEYS - _OPTIONAL), sorted(_KEYS - set(found))
    if strange or absent:
        raise UserError(f"{path}: unknown keys {strange}, missing keys {absent}.")
    if not isinstance(found["d_in"], int) or found["d_in"] < 1:
        raise UserError(f"{path}: d_in is {shown(found['d_in'])}; expected a positive number.")
    if not isinstance(found.get("d_out", 1), int) or found.get("d_out", 1) < 1:
        raise UserError(f"{path}: d_out is {shown(found['d_out'])}; expected a positive number.")
    for key in ("config", "metadata"):
        if not isinstance(found[key], dict):
            raise UserError(f"{path}: {key} is {shown(found[key])}; expected an object.")
    return found


def _tensors(path: Path, sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    tensors = read_safetensors(path)
    _check_sum(path, tensors)
    expected = {key: tuple(each.shape) for key, each in sae.state_dict().items()}
    found = {key: tuple(each.shape) for key, each in tensors.items()}
    if expected != found:
        differing = sorted(
            key for key in {*expected, *found} if expected.get(key) != found.get(key)
        )
        raise SparsightError(
            f"{path}: tensors do not fit config.json (d_in, d_out, n_latents, sparsity, tied, …): "
            + "; ".join(
                f"{key[:60]} is {found.get(key, 'missing')}, "
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
    # The checksum's own name may be what was altered.
    if SHA256 not in about and not any(len(each) == SHA256_DIGITS for each in about.values()):
        return
    if about.get(SHA256) != sha256_tensors(tensors):
        raise SparsightError(
            f"{path}: its checksum differs, so the file was altered or damaged since it was "
            "written. Take it again from where it came, or from a checkpoint of its run."
        )
