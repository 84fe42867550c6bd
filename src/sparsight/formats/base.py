"""What a format is: it turns a `Candidate` into a `Foreign`, and `Foreign.build` makes the SAE."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.formats.places import CONFIGS, files_in, folders_of, is_weights, some_of
from sparsight.pickles import shown
from sparsight.reading import begins_with_json, read_config, read_gzipped_pickle, read_torch
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig
from sparsight.sae.precision import wide
from sparsight.tensor_files import read_safetensors, safetensors_keys


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another project, in Sparsight's terms."""

    format: str
    """The format's name."""

    d_in: int
    """The width of the activations."""

    config: SAEConfig
    """The configuration of the parts; `n_latents` is taken from `W_enc`."""

    tensors: dict[str, Tensor]
    """Tensors under the names of `SparseAutoencoder.state_dict`; one row per latent."""

    d_out: int | None = None
    """The width of a transcoder's output."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """Where the SAE belongs, as far as the checkpoint says: model, site, tokens."""

    unknown: tuple[str, ...] = ()
    """Keys of the configuration, and tensors, that were not understood."""

    notes: tuple[str, ...] = ()
    """What the user must know about how the checkpoint was read."""

    def build(self) -> SparseAutoencoder:
        """Build the SAE, frozen and in evaluation mode; its tensors are float32.

        Raises:
            SparsightError: tensors are missing, do not fit one another, or are not finite.
        """
        if "W_enc" not in self.tensors or self.tensors["W_enc"].ndim != 2:
            raise SparsightError(f"{self._where}: it has no encoder matrix.")
        shape = tuple(self.tensors["W_enc"].shape)
        if shape[1] != self.d_in or 0 in shape:
            raise SparsightError(
                f"{self._where}: the encoder is {list(shape)}, for vectors of width {self.d_in}."
            )
        try:
            config = dataclasses.replace(self.config, n_latents=shape[0])
            extras: dict[str, Any] = {} if self.d_out is None else {"d_out": self.d_out}
            sae = SparseAutoencoder(
                self.d_in, config, blank=True, metadata=self._metadata_with_notes(), **extras
            )
        except UserError as error:
            raise SparsightError(f"{self._where}: {error}") from error
        wanted = sae.state_dict()
        given = {**{k: v for k, v in wanted.items() if "normaliser." in k}, **self.tensors}
        wrong = sorted(
            key
            for key in {*wanted, *given}
            if key not in wanted or key not in given or wanted[key].shape != given[key].shape
        )
        if wrong:
            raise SparsightError(
                f"{self._where}: tensors do not fit one another: "
                + "; ".join(
                    f"{key} is {_shape(given.get(key), 'missing')}, "
                    f"expected {_shape(wanted.get(key), 'nothing')}"
                    for key in wrong
                )
                + "."
            )
        given = {key: weights(tensor, key, self._where).float() for key, tensor in given.items()}
        for key, tensor in given.items():
            if not torch.isfinite(tensor).all():
                raise SparsightError(f"{self._where}: {key} holds values that are not finite.")
        sae.load_state_dict(given)
        sae.requires_grad_(False).eval()
        return sae

    def _metadata_with_notes(self) -> dict[str, Any]:
        """Return the metadata, with the notes in its source."""
        source: dict[str, Any] = {"format": self.format, **self.metadata.get("source", {})}
        if self.notes:
            source["notes"] = list(self.notes)
        if self.unknown:
            source["unknown"] = list(self.unknown)
        return {**self.metadata, "source": source}

    @property
    def _where(self) -> str:
        path = self.metadata.get("source", {}).get("path")
        return f"{path} ({self.format})" if path else self.format


class Candidate:
    """The files that the user points at: a folder, or one file and those beside it.

    Contents are cached, because several formats look at the same file to see whether it is theirs.

    Args:
        path: the folder or the file.
        name: the user's name for it, for messages; the path if None.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.chosen = None if self.path.is_dir() else self.path.name
        self._configs: dict[str, dict[str, Any]] = {}
        self._payloads: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names, relative to the folder, of the files in it and up to two folders below."""
        return files_in(self.folder)

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Files that can hold tensors: the one that the user named, or those in the folder."""
        if self.chosen is not None:
            return (self.chosen,)
        kept = [file for file in self.files if is_weights(file) and "/" not in file]
        # Of the same weights in several kinds of files, safetensors are read fastest.
        return tuple(sorted(kept, key=lambda file: (not file.endswith(".safetensors"), file)))

    def one(self) -> Path:
        """Return the folder with the only SAE (this folder or one in it), or the file.

        Raises:
            UserError: there are several SAEs, of which the user must name one.
        """
        safe = [file for file in self.weights if file.endswith(".safetensors")]
        if len(self.weights) > 1 and len(safe) != 1:
            raise UserError(
                f"{self.name}: holds {len(self.weights)} files with tensors. Name one: "
                f"{some_of(self.weights)}."
            )
        settled = [file for file in self.files if file.endswith(CONFIGS) and "/" not in file]
        if self.weights or settled:
            return self.path
        self.check_below()
        below = [file for file in self.files if is_weights(file)]
        return (self.folder / below[0]).parent if len(below) == 1 else self.path

    def check_below(self) -> None:
        """Check that the folders below this one do not hold several SAEs.

        Raises:
            UserError: they do; the user must name one.
        """
        below = [file for file in self.files if is_weights(file)]
        if self.chosen is None and not self.weights and len(below) > 1:
            places = folders_of(below)
            places = places if len(places) > 1 else below
            raise UserError(
                f"{self.name}: holds {len(places)} SAEs. Name one after the folder: "
                f"{some_of(places)}."
            )

    def has(self, file: str) -> bool:
        """Return whether there is a file with this name."""
        return (self.folder / file).is_file()

    def config(self, *files: str) -> dict[str, Any]:
        """Read the first of these JSON or YAML files that exists; empty if none does.

        Raises:
            SparsightError: the file is damaged.
        """
        for file in files:
            if file not in self._configs and self.has(file):
                self._configs[file] = read_config(self.folder / file)
            if file in self._configs:
                return self._configs[file]
        return {}

    def payload(self, file: str) -> Any:
        """Return what a file holds, as plain data; for safetensors, a dictionary of tensors.

        Raises:
            SparsightError: the file is damaged.
        """
        if file not in self._payloads:
            path = self.folder / file
            if file.endswith(".safetensors"):
                self._payloads[file] = read_safetensors(path)
            elif file.endswith(".gz"):
                self._payloads[file] = read_gzipped_pickle(path)
            elif begins_with_json(path):
                self._payloads[file] = {}  # a file of saev, which has a reader of its own
            else:
                self._payloads[file] = read_torch(path)
        return self._payloads[file]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Return the tensors at the top level of a file, as `named_tensors` does.

        Raises:
            SparsightError: the file is damaged.
        """
        if file not in self._tensors:
            self._tensors[file] = named_tensors(self.payload(file))
        return self._tensors[file]

    def keys(self, file: str) -> frozenset[str]:
        """Return the keys at the top level of a file, of tensors and of other things.

        Raises:
            SparsightError: the file is damaged.
        """
        if file.endswith(".safetensors") and file not in self._payloads:
            return frozenset(safetensors_keys(self.folder / file))
        content = self.payload(file)
        return frozenset(map(str, content)) if isinstance(content, dict) else frozenset()

    def find(self, *keys: str) -> str | None:
        """Return the first of the `weights` that has all of these keys at its top level.

        Raises:
            SparsightError: the only file is damaged.
        """
        wanted = set(keys)
        for file in self.weights:
            try:
                if wanted <= self.keys(file):
                    return file
            except SparsightError:
                if len(self.weights) == 1:
                    raise
        return None

    def source(self, format: str, file: str) -> dict[str, Any]:
        """Return the value of `Foreign.metadata["source"]`."""
        return {"format": format, "path": f"{self.name}: {file}" if file else self.name}


class Format(ABC):
    """How one project stores its SAEs; there is one instance per format, in `FORMATS`."""

    name: ClassVar[str]
    """The name for `--format` and messages."""

    title: ClassVar[str]
    """The name of the project, for readers."""

    can_save: ClassVar[bool] = False
    """Whether `save` can write the format."""

    @abstractmethod
    def recognises(self, candidate: Candidate) -> bool:
        """Return whether the files are in this format, judged by their contents."""

    @abstractmethod
    def load(self, candidate: Candidate) -> Foreign:
        """Read the files.

        Raises:
            UserError: the SAE has a part that Sparsight does not support.
            SparsightError: a file is damaged.
        """

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write an SAE that the project's own code loads, and that computes the same function of x.

        Returns:
            The folder that was written.

        Raises:
            UserError: the format cannot express the SAE, or Sparsight does not write it.
        """
        raise UserError(f"{self.title}: Sparsight reads this format but does not write it.")


def named_tensors(state: object) -> dict[str, Tensor]:
    """Return the named tensors of a state; empty if it is not a mapping.

    Every reader takes its tensors from here. Tensors in half precision become float32, so that no
    scale, norm or threshold is computed in half precision.
    """
    items = state.items() if isinstance(state, Mapping) else ()
    return {
        str(key): wide(value) if _is_half(value) else value
        for key, value in items
        if isinstance(value, Tensor)
    }


def need(tensors: Mapping[str, Tensor], keys: Iterable[str], where: object) -> list[Tensor]:
    """Return tensors by name.

    Raises:
        SparsightError: one is missing, or its numbers cannot be weights (see `weights`).
    """
    wanted = list(keys)
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise SparsightError(
            f"{where}: {', '.join(missing)} is missing; there is {', '.join(sorted(tensors))}."
        )
    return [weights(tensors[key], key, where) for key in wanted]


def weights(tensor: Tensor, key: str, where: object) -> Tensor:
    """Return the tensor if it can hold weights; matrices of integers are quantised weights.

    So are matrices of one-byte floats, whose scales are stored elsewhere, if at all.

    Raises:
        SparsightError: it is a matrix of integers, complex numbers or float8 numbers.
    """
    real = tensor.is_floating_point()
    if tensor.is_complex() or (tensor.itemsize < 2 if real else tensor.ndim > 1):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise SparsightError(
            f"{where}: {key} is of {kind}; expected real numbers of 16 bits or more. Quantised "
            "weights are not supported."
        )
    return tensor


def whole_number(config: Mapping[str, Any], key: str, where: object) -> int:
    """Return a setting that is an integer of 1 or more.

    Raises:
        SparsightError: it is missing, or is something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SparsightError(f"{where}: {key} is {shown(value)}; expected an integer of 1 or more.")
    return value


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _shape(tensor: Tensor | None, otherwise: str) -> str:
    return otherwise if tensor is None else shown(list(tensor.shape))
