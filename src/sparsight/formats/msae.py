"""MSAE (Zaigrajew et al. 2025): tensors in the file, and their meaning in the name of the file.

`4096_512_TopKReLU_64_RW_False_False_30.0_….pth`: latents, width, activation and k (for ReLU: its
L1), weighting of the Matryoshka levels, tied, normalised, soft cap. This is stated nowhere else, so
the name is read; the sizes in it, and whether weights are tied, are checked against the tensors.
Newer files (`checkpoint_version`) contain the same information.

z = (x − mean_center) · scaling_factor; f = cap · tanh(act((z − pre_bias) enc + latent_bias) / cap);
x̂ = (f dec + pre_bias) / scaling_factor + mean_center.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, named_tensors, need
from sparsight.pickles import shown, text_of
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import AnySparsity, JumpReLU, ReLU, TopK

_TENSORS = ("encoder", "pre_bias", "latent_bias")
_STATE = {*_TENSORS, "decoder", "latents_activation_frequency", "activation.log_threshold"}
_TOP = {"model", "mean_center", "scaling_factor", "target_norm"}
_NEW = {"model_state_dict", "model_config", "preprocessing"}
_NEW_REST = {"model_class", "bias_init_tensor", "training_metadata", "checkpoint_version"}
_LEVELS = ("UW", "RW", "FW")


@dataclass(frozen=True)
class _Meaning:
    """What the name of a file says."""

    n_latents: int
    d_in: int
    activation: str
    k: int | None
    matryoshka: bool
    tied: bool
    normalised: bool
    cap: float


class MSAE(Format):
    """Matryoshka, TopK and ReLU SAEs of MSAE, for embeddings of CLIP."""

    name = "msae"
    title = "MSAE"

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether a state has `encoder` and `latent_bias`, and the centring and scaling."""
        return self._file(candidate) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the file.

        Raises:
            UserError: the file was renamed, so that nothing says what its tensors mean; or
                Sparsight has no such activation.
            SparsightError: the file is damaged, or its name and its tensors disagree.
        """
        file = self._file(candidate)
        assert file is not None
        path = candidate.folder / file
        payload = candidate.payload(file)
        new = set(payload) >= _NEW
        state = payload["model_state_dict" if new else "model"]
        data = payload["preprocessing"] if new else payload
        if not isinstance(data, Mapping):
            raise SparsightError(f"{path}: preprocessing is {type(data).__name__}.")
        tensors = named_tensors(state)
        encoder, pre_bias, latent_bias = need(tensors, _TENSORS, path)
        meaning = _of_config(payload, path) if new else _of_name(path.name)
        _agree(meaning, tensors, path)
        d_in, n = encoder.shape
        ours = {"W_enc": encoder.T, "b_enc": latent_bias, "b_dec": pre_bias}
        if not meaning.tied:
            ours["W_dec"] = need(tensors, ("decoder",), path)[0]
        sparsity = _sparsity(meaning, path)
        if isinstance(sparsity, JumpReLU):
            ours["threshold"] = need(tensors, ("activation.log_threshold",), path)[0].exp()
        ours["normaliser.mean"], ours["normaliser.scale"] = _scaling(data, d_in, path)
        normaliser = "scale"
        if meaning.normalised:
            if bool((ours["normaliser.mean"] != 0).any()) or float(ours["normaliser.scale"]) != 1:
                raise UserError(
                    f"{path}: it scales the data and normalises every vector as well; Sparsight "
                    "has one normaliser."
                )
            normaliser = "layer_norm"
            del ours["normaliser.mean"], ours["normaliser.scale"]
        notes = [] if new else [f"k, tied and cap are read from the name of the file, {path.name}"]
        if meaning.matryoshka:
            notes.append(
                f"of its levels, which begin with k = {meaning.k}, the last is used: all positive "
                "latents"
            )
        rest = _NEW | _NEW_REST if new else _TOP
        strange = [str(key) for key in payload if key not in rest]
        strange += [f"model.{key}" for key in state if key not in _STATE]
        return Foreign(
            format=self.name,
            d_in=d_in,
            config=SAEConfig(
                n_latents=n,
                sparsity=sparsity,
                normaliser="layer_norm" if normaliser == "layer_norm" else "scale",
                unit_norm_decoder=False,
                tied=meaning.tied,
                soft_cap=meaning.cap if meaning.cap > 0 else None,
            ),
            tensors=ours,
            metadata={"site": "embedding", "source": candidate.source(self.name, file)},
            unknown=tuple(sorted(strange)),
            notes=tuple(notes),
        )

    @staticmethod
    def _file(candidate: Candidate) -> str | None:
        for file in candidate.weights:
            keys = candidate.keys(file)
            name = next(
                (
                    part
                    for part, wanted in {"model": _TOP, "model_state_dict": _NEW}.items()
                    if keys >= wanted
                ),
                None,
            )
            state = None if name is None else candidate.payload(file)[name]
            if isinstance(state, Mapping) and set(state) >= set(_TENSORS):
                return file
        return None


def _of_name(name: str) -> _Meaning:
    """Parse the name of a file, from left to right.

    Raises:
        UserError: it does not have the form of MSAE's names.
    """
    words = name[: name.find(".pt")].split("_") if ".pt" in name else []
    try:
        n_latents, d_in, activation = int(words.pop(0)), int(words.pop(0)), words.pop(0)
        k = None
        if "TopK" in activation:
            k = int(words.pop(0))
        elif activation == "ReLU":
            words.pop(0)  # the fractional digits of its L1
        matryoshka = words[0] in _LEVELS
        if matryoshka:
            words.pop(0)
        tied, normalised = ({"True": True, "False": False}[words.pop(0)] for _ in range(2))
        return _Meaning(
            n_latents, d_in, activation, k, matryoshka, tied, normalised, float(words.pop(0))
        )
    except (ValueError, IndexError, KeyError):
        raise UserError(
            f"{name}: only the name of an MSAE checkpoint says what it is, for example "
            "4096_512_TopKReLU_64_RW_False_False_30.0_cc3m.pth, and this name does not. Give the "
            "file the name back under which it was published."
        ) from None


def _of_config(payload: Mapping[str, Any], path: Path) -> _Meaning:
    """Read the same from the configuration inside a newer file.

    Raises:
        UserError: it belongs to a class that Sparsight does not support.
        SparsightError: a value is missing or of another type.
    """
    config, kind = payload["model_config"], payload.get("model_class", "Autoencoder")
    if kind not in ("Autoencoder", "MatryoshkaAutoencoder"):
        raise UserError(f"{path}: SAEs of the class {shown(kind)} are not supported.")
    try:
        activation, _, k = text_of(config["activation"]).partition("_")
        nesting = config.get("nesting_list")
        if not k and isinstance(nesting, list) and nesting:
            k = str(min(nesting))
        return _Meaning(
            int(config["n_latents"]),
            int(config["n_inputs"]),
            activation,
            int(k) if k else None,
            kind == "MatryoshkaAutoencoder",
            bool(config["tied"]),
            bool(config["normalize"]),
            float(config["latent_soft_cap"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparsightError(f"{path}: model_config cannot be read ({error!r}).") from error


def _agree(meaning: _Meaning, tensors: Mapping[str, Tensor], path: Path) -> None:
    shape = tuple(tensors["encoder"].shape)
    if shape != (meaning.d_in, meaning.n_latents):
        raise SparsightError(
            f"{path}: its name says {meaning.n_latents} latents for width {meaning.d_in}, but its "
            f"encoder is {list(shape)}. Was the file renamed?"
        )
    if meaning.tied == ("decoder" in tensors):
        raise SparsightError(
            f"{path}: its name says that weights are {'tied' if meaning.tied else 'not tied'}, but "
            f"there is {'a' if meaning.tied else 'no'} decoder. Was the file renamed?"
        )
    if not math.isfinite(meaning.cap):
        raise SparsightError(f"{path}: the soft cap is {meaning.cap}.")


def _sparsity(meaning: _Meaning, path: Path) -> AnySparsity:
    name = meaning.activation
    if name == "ReLU" or (meaning.matryoshka and name == "TopKReLU"):
        return ReLU()
    if name == "JumpReLU":
        return JumpReLU()
    if name == "Identity":
        return TopK(k=meaning.n_latents, rectify=False)
    if name in ("TopK", "TopKReLU") and meaning.k and not meaning.matryoshka:
        if not 1 <= meaning.k <= meaning.n_latents:
            raise SparsightError(f"{path}: k is {meaning.k}, of {meaning.n_latents} latents.")
        return TopK(k=meaning.k, rectify=name == "TopKReLU")
    raise UserError(
        f"{path}: the activation {shown(name)} is not supported; ReLU, JumpReLU, TopK, TopKReLU "
        "are. (BatchTopK has no threshold in these files, and TopKabs drops signs.)"
    )


def _scaling(data: Mapping[str, Any], d_in: int, path: Path) -> tuple[Tensor, Tensor]:
    """Return mean and scale of the normaliser; scaling_factor multiplies, a scale divides."""
    mean = torch.as_tensor(data.get("mean_center", 0.0), dtype=torch.float32)
    factor = torch.as_tensor(data.get("scaling_factor", 1.0), dtype=torch.float32)
    if mean.numel() not in (1, d_in) or factor.numel() != 1 or not float(factor) > 0:
        raise SparsightError(
            f"{path}: mean_center has {mean.numel()} entries and scaling_factor is {factor}; "
            f"expected 1 or {d_in}, and a positive number."
        )
    return mean.flatten().expand(d_in).contiguous(), 1 / factor.reshape(1)
