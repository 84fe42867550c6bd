"""saev: a line of JSON, followed by four tensors as written by `torch.save`, in one file.

f = act(x W_enc + b_enc), x̂ = f W_dec + b_dec. Files without a schema, and those of the first
schema, were written by versions whose encoder reads x − b_dec; later encoders read x. Later
versions load the old files without the subtraction; Sparsight reads an SAE like the version that
trained it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsight
from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, need
from sparsight.formats.writing import above, at_least, keeps_negatives, plain, write_torch
from sparsight.pickles import shown
from sparsight.reading import parse_json, read_torch_stream
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import AnySparsity, BatchTopK, ReLU, TopK
from sparsight.tensor_files import damaged

LONGEST_HEADER = 1 << 20
"""Longest first line, in bytes."""

NEWEST_SCHEMA = 5

_KNOWN = {
    *("d_vit", "d_model", "d_sae", "exp_factor", "activation", "top_k", "seed", "cls"),
    *("n_reinit_samples", "reinit_blend", "reinit_enc_dec_tranpose"),
    *("remove_parallel_grads", "normalize_w_dec"),
    *("sparsity_coeff", "l1_coeff", "ghost_grads", "use_ghost_grads"),
}
_AROUND = {"schema", "cls", "cfg", "commit", "lib"}
_PARAMS = {"key", "top_k", "momentum", "sparsity", "aux"}
_TOKENS = {
    **{"special": "cls", "content": "patches"},
    **{"cls": "cls", "image": "patches", "patches": "patches", "all": "all", "meanpool": "mean"},
}
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_THRESHOLD = "activation.threshold"


@dataclass(frozen=True)
class _Header:
    """The first line of a file, whatever its schema."""

    d_in: int
    n_latents: int
    activation: str
    k: int
    subtract_b_dec: bool
    unknown: tuple[str, ...]


class Saev(Format):
    """Checkpoints of saev, in all its schemas."""

    name = "saev"
    title = "saev"
    can_save = True

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether a file begins with a line of JSON that gives the activations' width."""
        return self._file(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the file, and the configuration of its training if it lies beside it."""
        file = self._file(candidate)
        assert file is not None
        path = candidate.folder / file
        header = _read_header(_header_line(path) or {}, path)
        state = _state(path)
        tensors = dict(zip(_TENSORS, need(state, _TENSORS, path), strict=True))
        for key in ("W_enc", "W_dec"):
            wanted = (header.d_in, header.n_latents)
            wanted = wanted if key == "W_enc" else wanted[::-1]
            if tuple(tensors[key].shape) != wanted:
                raise SparsightError(
                    f"{path}: {key} is {list(tensors[key].shape)}, but its header says "
                    f"{list(wanted)}."
                )
        tensors["W_enc"] = tensors["W_enc"].T
        sparsity, notes = _sparsity(header, state, path)
        if isinstance(sparsity, BatchTopK):
            tensors["threshold"] = at_least(state[_THRESHOLD])
        if header.subtract_b_dec:
            notes.append(
                "it was trained by a version of saev whose encoder subtracts b_dec, and is read "
                "accordingly; later versions load it without the subtraction"
            )
        strange = sorted(set(state) - {*_TENSORS, _THRESHOLD})
        return Foreign(
            format=self.name,
            d_in=header.d_in,
            config=SAEConfig(
                n_latents=header.n_latents,
                sparsity=sparsity,
                normaliser="none",
                unit_norm_decoder=False,
                subtract_b_dec=header.subtract_b_dec,
            ),
            tensors=tensors,
            metadata={
                **_belongs(candidate.config("config.json")),
                "source": candidate.source(self.name, file),
            },
            unknown=(*header.unknown, *strange),
            notes=tuple(notes),
        )

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write `sae.pt` in the newest schema, with the normaliser folded in.

        Raises:
            UserError: the sparsity is not ReLU, TopK or BatchTopK.
        """
        parts = plain(sae, self.title)
        parts.autoencoder_only(self.title)
        none = _part("NoSparsity", key="no-sparsity")
        aux = _part("NoAux", key="no-aux")
        sparsity = parts.sparsity
        state: dict[str, Tensor] = {
            "W_dec": parts.W_dec,
            "b_dec": parts.b_dec,
            "W_enc": parts.W_enc.T.contiguous(),
            "b_enc": parts.biases(subtracts=False)[0],
        }
        if isinstance(sparsity, ReLU):
            activation = _part("Relu", key="relu", sparsity=none, aux=aux)
        elif isinstance(sparsity, TopK):
            keeps_negatives(sparsity, self.title)
            activation = _part("TopK", key="top-k", top_k=sparsity.k, sparsity=none, aux=aux)
        elif isinstance(sparsity, BatchTopK):
            aux = _part("AuxK", key="auxk", k_aux=512, alpha=1 / 32)
            activation = _part(
                "BatchTopK",
                **{"key": "batch-top-k", "top_k": sparsity.k, "sparsity": none},
                **{"momentum": 0.1, "aux": aux},
            )
            assert parts.threshold is not None
            state[_THRESHOLD] = above(parts.threshold)
        else:
            raise UserError(f"saev has ReLU, TopK and BatchTopK; not {type(sparsity).__name__}.")
        header = {
            "schema": NEWEST_SCHEMA,
            "cfg": {
                "d_model": sae.d_in,
                "d_sae": sae.n_latents,
                "activation": activation,
                "reinit_blend": 0.8,
                "reinit_enc_dec_tranpose": True,
                "remove_parallel_grads": True,
                "normalize_w_dec": False,
            },
            "commit": "unknown",
            "lib": f"sparsight {sparsight.__version__}",
        }
        write_torch(state, folder / "sae.pt", header=json.dumps(header).encode() + b"\n")
        return folder

    @staticmethod
    def _file(candidate: Candidate) -> str | None:
        for file in candidate.weights:
            if file.endswith((".safetensors", ".gz")):
                continue
            header = _header_line(candidate.folder / file)
            if header is not None:
                return file
        return None


def _header_line(path: Path) -> dict[str, Any] | None:
    """Return the JSON in the first line; None if the file does not begin with JSON."""
    try:
        with path.open("rb") as file:
            line = file.readline(LONGEST_HEADER + 1)
    except OSError as error:
        raise damaged(path, error) from error
    if not line.startswith(b"{"):
        return None
    if len(line) > LONGEST_HEADER or not line.endswith(b"\n"):
        raise damaged(path, "it begins with JSON whose line does not end")
    try:
        header = parse_json(line.decode(), path)
    except UnicodeDecodeError as error:
        raise damaged(path, error) from error
    return header if isinstance(header, dict) else None


def _state(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            skipped = len(file.readline(LONGEST_HEADER + 1))
            state = read_torch_stream(file, path.stat().st_size - skipped, path)
    except OSError as error:
        raise damaged(path, error) from error
    if not isinstance(state, Mapping):
        raise damaged(path, "after the first line there are no named tensors")
    return named_tensors(state)


def _read_header(given: Mapping[str, Any], path: Path) -> _Header:
    schema = given.get("schema")
    if "schema" not in given:
        cfg, old = dict(given), True
        activation: dict[str, Any] = {"cls": "Relu"}
    elif schema == 1 and given.get("cls") in ("Relu", "TopK", "BatchTopK"):
        cfg = _object(given.get("cfg"), path)
        activation, old = {"cls": given["cls"], "params": cfg}, True
    elif schema in range(1, NEWEST_SCHEMA + 1):
        cfg = _object(given.get("cfg"), path)
        activation, old = _object(cfg.get("activation", {"cls": "Relu"}), path), False
    else:
        raise UserError(
            f"{path}: the schema is {shown(schema)}; Sparsight knows those of saev up to "
            f"{NEWEST_SCHEMA}. A newer Sparsight may read it."
        )
    params = _object(activation.get("params", activation), path)
    kind = activation.get("cls", "Relu" if "top_k" not in params else None)
    if kind not in ("Relu", "TopK", "BatchTopK"):
        raise UserError(f"{path}: the activation is {shown(kind)}; saev has Relu, TopK, BatchTopK.")
    d_in = _count(cfg.get("d_model", cfg.get("d_vit")), "d_model", path)
    if "d_sae" in cfg:
        n_latents = _count(cfg["d_sae"], "d_sae", path)
    else:
        n_latents = d_in * _count(cfg.get("exp_factor"), "exp_factor", path)
    k = 1 if kind == "Relu" else _count(params.get("top_k", 32), "top_k", path)
    unknown = {*cfg} - _KNOWN
    if "schema" in given:
        unknown |= {*given} - _AROUND
    if params is not cfg:
        nested = params is not activation
        around = {*activation} - {"cls", "params"} if nested else set()
        inside = "activation.params" if nested else "activation"
        unknown |= {f"activation.{key}" for key in around}
        unknown |= {f"{inside}.{key}" for key in {*params} - {*_PARAMS, "cls"}}
    return _Header(d_in, n_latents, kind, min(k, n_latents), old, tuple(sorted(unknown)))


def _sparsity(
    header: _Header, state: Mapping[str, Tensor], path: Path
) -> tuple[AnySparsity, list[str]]:
    if header.activation == "Relu":
        return ReLU(), []
    if header.activation == "TopK":
        return TopK(k=header.k, rectify=False), []
    threshold = state.get(_THRESHOLD)
    if threshold is None:
        return TopK(k=header.k, rectify=False), [
            f"its BatchTopK has no threshold: the {header.k} largest of every vector are kept"
        ]
    if threshold.shape != torch.Size([]):
        raise SparsightError(f"{path}: {_THRESHOLD} is {list(threshold.shape)}, not one number.")
    return BatchTopK(k=header.k), []


def _belongs(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return site and tokens, from the configuration of the training."""
    about: dict[str, Any] = {}
    for key in ("train_data", "data"):
        data = training.get(key)
        if not isinstance(data, Mapping):
            continue
        layer = data.get("layer")
        if type(layer) is int:
            about["site"] = f"blocks.{layer}.resid_post"
        tokens = data.get("tokens", data.get("patches"))
        if isinstance(tokens, str) and tokens in _TOKENS:
            about["tokens"] = _TOKENS[tokens]
        break
    return about


def _part(cls: str, **params: Any) -> dict[str, Any]:
    return {"cls": cls, "params": params}


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SparsightError(
            f"{path}: its first line holds {shown(value)} where an object belongs."
        )
    return value


def _count(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise SparsightError(
            f"{path}: {name} is {shown(value)} in its first line; expected a number."
        )
    return value
