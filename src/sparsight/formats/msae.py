"""MSAE (Zaigrajew et al. 2025): tensors in the file, and all that they mean in the file's name.

`4096_512_TopKReLU_64_RW_False_False_30.0_….pth`: latents, width, activation and k (of ReLU: its
L1), weighting of the Matryoshka levels, tied, normalised, soft cap. There is no other place, so the
name is read; the sizes in it, and whether weights are tied, are held against the tensors. Newer
files (`checkpoint_version`) carry the same inside.

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

    def recognises(self, found: Candidate) -> bool:
        """A state with `encoder` and `latent_bias`, and how the data were centred and scaled."""
        return self._file(found) is not None

    def load(self, found: Candidate) -> Foreign:
        """Read it.

        Raises:
            UserError: the file was renamed, so that nothing says what its tensors mean; or its
                activation has no equal.
            SparsightError: the file is damaged, or its name and its tensors do not agree.
        """
        file = self._file(found)
        assert file is not None
        path = found.folder / file
        payload = found.payload(file)
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
            metadata={"site": "embedding", "source": found.source(self.name, file)},
            unknown=tuple(sorted(strange)),
            notes=tuple(notes),
        )

    @staticmethod
    def _file(found: Candidate) -> str | None:
        for file in found.weights:
            keys = found.keys(file)
            name = next(
                (
                    part
                    for part, wanted in {"model": _TOP, "model_state_dict": _NEW}.items()
                    if keys >= wanted
                ),
                None,
            )
            state = None if name is None else found.payload(file)[name]
            if isinstance(state, Mapping) and set(state) >= set(_TENSORS):
                return file
        return None


def _of_name(name: str) -> _Meaning:
    """Read the name of a file, from left to right.

    Raises:
        UserError: it is not made like those of MSAE.
    """
    words = name[: name.find(".pt")].split("_") if ".pt" in name else []
    try:
        n_latents, d_in, activation = int(words.pop(0)), int(words.pop(0)), words.pop(0)
        k = None
        if "TopK" in activation:
            k = int(words.pop(0))
        elif activation == "ReLU":
            words.pop(0)  # what follows the point of its L1
        matryoshka = words[0] in _LEVELS
        if matryoshka:
            words.pop(0)
        tied, normalised = ({"True": True, "False": False}[words.pop(0)] for _ in range(2))
        return _Meaning(
            n_latents, d_in, activation, k, matryoshka, tied, normalised, float(words.pop(0))
        )
    except (ValueError, IndexError, KeyError):
        raise UserError(
            f"{name}: an MSAE checkpoint says what it is in its name alone, such as "
            "4096_512_TopKReLU_64_RW_False_False_30.0_cc3m.pth, and this is no such name. Give the "
            "file the name back that it was published under."
        ) from None


def _of_config(payload: Mapping[str, Any], path: Path) -> _Meaning:
    """The same from a newer file's own words.

    Raises:
        UserError: it is of a class that Sparsight has no equal of.
        SparsightError: a value is missing or of another type.
    """
    config, kind = payload["model_config"], payload.get("model_class", "Autoencoder")
    if kind not in ("Autoencoder", "MatryoshkaAutoencoder"):
        raise UserError(f"{path}: SAEs of the class {shown(kind)} are not read.")
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
            f"{path}: by its name it has {meaning.n_latents} latents for width {meaning.d_in}; its "
            f"encoder is {list(shape)}. Was the file renamed?"
        )
    if meaning.tied == ("decoder" in tensors):
        raise SparsightError(
            f"{path}: by its name the weights are {'tied' if meaning.tied else 'not tied'}, but "
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
        f"{path}: the activation {shown(name)} is not read; ReLU, JumpReLU, TopK and TopKReLU are. "
        "(BatchTopK has no threshold in these files, and TopKabs drops signs.)"
    )


def _scaling(data: Mapping[str, Any], d_in: int, path: Path) -> tuple[Tensor, Tensor]:
    """Mean and scale of the normaliser; scaling_factor multiplies, a scale divides."""
    mean = torch.as_tensor(data.get("mean_center", 0.0), dtype=torch.float32)
    factor = torch.as_tensor(data.get("scaling_factor", 1.0), dtype=torch.float32)
    if mean.numel() not in (1, d_in) or factor.numel() != 1 or not float(factor) > 0:
        raise SparsightError(
            f"{path}: mean_center has {mean.numel()} entries and scaling_factor is {factor}; "
            f"expected 1 or {d_in}, and a positive number."
        )
    return mean.flatten().expand(d_in).contiguous(), 1 / factor.reshape(1)
