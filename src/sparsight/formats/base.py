"""What a format is: `Candidate` in, `Foreign` out, and `Foreign.build` makes the SAE."""

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
    """A checkpoint of another project, in our terms."""

    format: str
    """The format's name."""

    d_in: int
    """Width of the activations."""

    config: SAEConfig
    """The parts; `n_latents` is taken from `W_enc`."""

    tensors: dict[str, Tensor]
    """By the names that `SparseAutoencoder.state_dict` has; rows are latents."""

    d_out: int | None = None
    """Width of a transcoder's output."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """Where the SAE belongs, as far as the checkpoint says: model, site, tokens."""

    unknown: tuple[str, ...] = ()
    """Keys of the configuration, and tensors, that were not understood."""

    notes: tuple[str, ...] = ()
    """What a user must know of the way that it was read."""

    def build(self) -> SparseAutoencoder:
        """The SAE, frozen and in evaluation mode; its tensors are float32.

        Raises:
            SparsightError: tensors are missing, do not fit one another, or are not finite.
        """
        if "W_enc" not in self.tensors or self.tensors["W_enc"].ndim != 2:
            raise SparsightError(f"{self._where}: there is no encoder matrix.")
        shape = tuple(self.tensors["W_enc"].shape)
        if shape[1] != self.d_in or 0 in shape:
            raise SparsightError(
                f"{self._where}: the encoder is {list(shape)}, for vectors of width {self.d_in}."
            )
        try:
            config = dataclasses.replace(self.config, n_latents=shape[0])
            extras: dict[str, Any] = {} if self.d_out is None else {"d_out": self.d_out}
            sae = SparseAutoencoder(self.d_in, config, blank=True, metadata=self._told(), **extras)
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

    def _told(self) -> dict[str, Any]:
        """The metadata, its source with what was noted."""
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
    """The files that a user points at: a folder, or one file and what lies beside it.

    What is read is kept: several formats look at the same file to tell whether it is theirs.

    Args:
        path: the folder or the file.
        name: what the user called it, for messages; the path if None.
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
        kept = [each for each in self.files if is_weights(each) and "/" not in each]
        # Of the same weights in several kinds of files the safetensors are read most quickly.
        return tuple(sorted(kept, key=lambda each: (not each.endswith(".safetensors"), each)))

    def one(self) -> Path:
        """The folder with the one SAE that there is: this one, or one in it; or the file.

        Raises:
            UserError: there are several, of which the user must name one.
        """
        safe = [each for each in self.weights if each.endswith(".safetensors")]
        if len(self.weights) > 1 and len(safe) != 1:
            raise UserError(
                f"{self.name}: holds {len(self.weights)} files with tensors. Name one: "
                f"{some_of(self.weights)}."
            )
        settled = [each for each in self.files if each.endswith(CONFIGS) and "/" not in each]
        if self.weights or settled:
            return self.path
        self.check_below()
        below = [each for each in self.files if is_weights(each)]
        return (self.folder / below[0]).parent if len(below) == 1 else self.path

    def check_below(self) -> None:
        """Make sure that there are not several SAEs in folders of this one.

        Raises:
            UserError: there are, of which the user must name one.
        """
        below = [each for each in self.files if is_weights(each)]
        if self.chosen is None and not self.weights and len(below) > 1:
            places = folders_of(below)
            places = places if len(places) > 1 else below
            raise UserError(
                f"{self.name}: holds {len(places)} SAEs. Name one behind the folder: "
                f"{some_of(places)}."
            )

    def has(self, file: str) -> bool:
        """Whether there is a file of this name."""
        return (self.folder / file).is_file()

    def config(self, *files: str) -> dict[str, Any]:
        """The first of these JSON or YAML files that is there; empty if none is.

        Raises:
            SparsightError: it is damaged.
        """
        for file in files:
            if file not in self._configs and self.has(file):
                self._configs[file] = read_config(self.folder / file)
            if file in self._configs:
                return self._configs[file]
        return {}

    def payload(self, file: str) -> Any:
        """What a file holds, as plain data; of safetensors a dictionary of tensors.

        Raises:
            SparsightError: it is damaged.
        """
        if file not in self._payloads:
            path = self.folder / file
            if file.endswith(".safetensors"):
                self._payloads[file] = read_safetensors(path)
            elif file.endswith(".gz"):
                self._payloads[file] = read_gzipped_pickle(path)
            elif begins_with_json(path):
                self._payloads[file] = {}  # saev's, whose reader looks for itself
            else:
                self._payloads[file] = read_torch(path)
        return self._payloads[file]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors at the top of a file, as `named_tensors` gives them.

        Raises:
            SparsightError: it is damaged.
        """
        if file not in self._tensors:
            self._tensors[file] = named_tensors(self.payload(file))
        return self._tensors[file]

    def keys(self, file: str) -> frozenset[str]:
        """What stands at the top of a file, tensors and other things.

        Raises:
            SparsightError: it is damaged.
        """
        if file.endswith(".safetensors") and file not in self._payloads:
            return frozenset(safetensors_keys(self.folder / file))
        found = self.payload(file)
        return frozenset(map(str, found)) if isinstance(found, dict) else frozenset()

    def find(self, *keys: str) -> str | None:
        """The first of the `weights` that has all of these keys at its top.

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
        """For `Foreign.metadata["source"]`."""
        return {"format": format, "path": f"{self.name}: {file}" if file else self.name}


class Format(ABC):
    """How one project stores its SAEs; one instance a format, in `FORMATS`."""

    name: ClassVar[str]
    """For `--format` and messages."""

    title: ClassVar[str]
    """The project, for readers."""

    can_save: ClassVar[bool] = False
    """Whether `save` writes it."""

    @abstractmethod
    def recognises(self, found: Candidate) -> bool:
        """Whether the files are of this format, by what is in them."""

    @abstractmethod
    def load(self, found: Candidate) -> Foreign:
        """Read it.

        Raises:
            UserError: it has a part that Sparsight has no equal of.
            SparsightError: a file is damaged.
        """

    def save(self, sae: SparseAutoencoder, folder: Path) -> Path:
        """Write an SAE so that the project's own code loads it, with the same function of x.

        Returns:
            The folder.

        Raises:
            UserError: the format cannot express the SAE, or Sparsight does not write it.
        """
        raise UserError(f"{self.title}: Sparsight reads this format but does not write it.")


def named_tensors(state: object) -> dict[str, Tensor]:
    """The tensors of a state by name; empty if it is no mapping.

    Every reader takes its tensors from here. Those in half precision become float32, so that no
    scale, norm or threshold is computed in half precision.
    """
    items = state.items() if isinstance(state, Mapping) else ()
    return {
        str(key): wide(each) if _is_half(each) else each
        for key, each in items
        if isinstance(each, Tensor)
    }


def need(tensors: Mapping[str, Tensor], keys: Iterable[str], where: object) -> list[Tensor]:
    """Tensors by name.

    Raises:
        SparsightError: one is missing, or is of numbers that are no weights (see `weights`).
    """
    wanted = list(keys)
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise SparsightError(
            f"{where}: {', '.join(missing)} is missing; there is {', '.join(sorted(tensors))}."
        )
    return [weights(tensors[key], key, where) for key in wanted]


def weights(tensor: Tensor, key: str, where: object) -> Tensor:
    """The tensor, if it can be weights: whole numbers in place of them are quantised.

    So are floating-point numbers of one byte, whose scales lie elsewhere, if anywhere.

    Raises:
        SparsightError: it is a matrix of whole numbers, or of complex or float8 numbers.
    """
    real = tensor.is_floating_point()
    if tensor.is_complex() or (tensor.itemsize < 2 if real else tensor.ndim > 1):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise SparsightError(
            f"{where}: {key} is of {kind}; expected real numbers of 16 bits or more. Quantised "
            "weights are not read."
        )
    return tensor


def whole_number(config: Mapping[str, Any], key: str, where: object) -> int:
    """A setting that is a number from 1 on.

    Raises:
        SparsightError: it is missing, or is something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SparsightError(f"{where}: {key} is {shown(value)}; expected a number from 1 on.")
    return value


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _shape(tensor: Tensor | None, otherwise: str) -> str:
    return otherwise if tensor is None else shown(list(tensor.shape))
