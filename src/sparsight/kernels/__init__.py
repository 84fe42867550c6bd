"""The basic operations of an SAE, in several back ends.

`encode_topk` and `decode_topk` are differentiable functions of tensors: `sparse` touches only k
rows per vector wherever it can, `dense` is plain autograd, the reference for tests; `using` changes
between them. `training_step` returns a whole step for a trainer, with its own Adam: without
autograd in plain torch, compiled code or Triton, or in plain autograd.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import UserError
from sparsight.kernels import dense, inference, sparse
from sparsight.kernels.bounds import fast_bfloat16, fast_int8, supports_int8
from sparsight.kernels.dense_step import DenseStep, Loss
from sparsight.kernels.interface import (
    Adam,
    Backend,
    FusedStep,
    Precision,
    StepFigures,
    TrainingStep,
)
from sparsight.kernels.native.library import load as load_native
from sparsight.kernels.native.library import multiplies_int8
from sparsight.kernels.native.step import NativeStep
from sparsight.kernels.plan import AnyPlan, Plan, Stage
from sparsight.kernels.torch_step import TorchStep

__all__ = [
    "BACKENDS",
    "Adam",
    "Backend",
    "FusedStep",
    "Kernels",
    "Plan",
    "Precision",
    "Stage",
    "StepFigures",
    "TrainingStep",
    "backend",
    "choose",
    "decode_topk",
    "encode_topk",
    "native_is_absent",
    "training_step",
    "using",
]

Kernels = Literal["auto", "dense", "torch", "native", "triton"]
"""Kernels that compute a training step; "auto" is the fastest that runs here."""

BACKENDS: dict[str, Backend] = {
    "auto": sparse,
    "torch": sparse,
    "native": sparse,
    "dense": dense,
}
"""Back ends of the differentiable functions; "auto" selects with compiled code where faster."""

_current = "auto"


@contextmanager
def using(name: str) -> Iterator[None]:
    """Compute `encode_topk` and `decode_topk` with another back end inside a `with`.

    Raises:
        UserError: the back end is unknown.
    """
    global _current
    if name not in BACKENDS:
        raise UserError(f"Unknown kernels {name!r}; choose one of {', '.join(BACKENDS)}.")
    if name == "native":
        choose("native", "auto", torch.device("cpu"))
    before, _current = _current, name
    inference.compiled = name != "torch"
    try:
        yield
    finally:
        _current = before
        inference.compiled = before != "torch"


def choose(
    kernels: Kernels, precision: Precision | Literal["auto"], device: torch.device
) -> tuple[Kernels, Precision]:
    """Choose the back end and the precision of the selection for a training run.

    Args:
        kernels: the requested kernels.
        precision: the requested precision.
        device: the device of the parameters.

    Raises:
        UserError: the request does not run here.
    """
    if kernels == "auto":
        kernels = _quickest(device)
    if kernels == "native" and device.type != "cpu":
        raise UserError(
            f"kernels 'native' run on the CPU, not on {device.type}. Choose 'auto' or 'torch'."
        )
    if kernels == "native" and load_native() is None:
        raise UserError(
            "kernels 'native' are not built, because Sparsight was installed without a C compiler. "
            "Install one and run `python -m sparsight.kernels.native.build`, or choose 'torch'."
        )
    if kernels == "triton":
        _check_triton(device)
    if kernels == "dense" and precision not in ("auto", "float32"):
        raise UserError(f"kernels 'dense' select exactly; leave out precision {precision!r}.")
    in_torch = kernels == "torch" and supports_int8(device)
    if precision == "int8" and kernels != "native" and not in_torch:
        raise UserError(
            "precision 'int8' needs the kernels 'native', or 'torch' on a processor with VNNI, but "
            f"these are {kernels!r} on {device.type}. Leave precision out."
        )
    if precision == "float8" and (kernels != "triton" or not _multiplies_float8(device)):
        raise UserError(
            "precision 'float8' needs kernels 'triton', named explicitly, on an NVIDIA GPU of "
            f"compute capability 8.9 or more, but these are {kernels!r} on {device.type}. "
            "Leave precision out."
        )
    if precision == "auto":
        if (in_torch and fast_int8(device)) or (kernels == "native" and multiplies_int8()):
            precision = "int8"
        elif kernels in ("torch", "triton") and fast_bfloat16(device):
            precision = "bfloat16"
        else:
            precision = "float32"
    return kernels, precision


def _quickest(device: torch.device) -> Kernels:
    if device.type == "cpu" and load_native() is not None:
        return "native"
    # Not Triton: its kernels have not yet run on any GPU.
    return "torch"


def native_is_absent(device: torch.device) -> bool:
    """Return whether the native kernels would be the fastest, but are not built."""
    return device.type == "cpu" and load_native() is None


def _new_enough(device: torch.device) -> bool:
    """Return whether Triton supports this GPU, and the GPU multiplies in bfloat16."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _multiplies_float8(device: torch.device) -> bool:
    if device.type != "cuda":  # in Triton's interpreter
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _load_triton() -> ModuleType | None:
    """Return the module of the step in Triton; None if Triton is not installed."""
    try:
        return importlib.import_module("sparsight.kernels.triton_step")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None


def _check_triton(device: torch.device) -> None:
    """Raise a UserError unless Triton's kernels run here; its interpreter runs on any device."""
    loaded = _load_triton()
    if loaded is None:
        raise UserError(
            "kernels 'triton' need Triton, which is not installed. Run "
            "`pip install 'sparsight[triton]'`, or choose 'torch'."
        )
    if device.type != "cuda" and not loaded.INTERPRETED:
        raise UserError(
            f"kernels 'triton' run on CUDA, not on {device.type}. Choose 'auto'; or, to try them "
            "slowly, set TRITON_INTERPRET=1 in the environment."
        )
    if device.type == "cuda" and not loaded.INTERPRETED and not _new_enough(device):
        raise UserError(
            "kernels 'triton' need a GPU of compute capability 8.0 or more, but "
            f"{torch.cuda.get_device_name(device)} has less. Choose 'torch'."
        )


def training_step(
    kernels: Kernels,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, tuple[Tensor, Tensor]],
    since_fired: Int[Tensor, " n_latents"],
    plan: AnyPlan,
    adam: Adam,
    *,
    loss: Loss | None = None,
    lr_factors: Mapping[str, float] | None = None,
    **settings: Any,
) -> TrainingStep:
    """Return the training step of a back end.

    Args:
        kernels: the back end; not "auto".
        parameters, moments, since_fired, adam: see `FusedStep`.
        plan: what to minimise.
        loss: the same, differentiable; only for "dense".
        lr_factors: multiples of the learning rate for parameters; only with "dense".
        settings: `variance`, `unit_norm` and `precision`, see `FusedStep`.
    """
    if kernels == "dense":
        assert loss is not None
        return DenseStep(
            parameters, moments, since_fired, loss, adam, lr_factors=lr_factors, **settings
        )
    kind: Callable[..., FusedStep]
    if kernels == "triton":
        from sparsight.kernels.triton_step import TritonStep

        kind = TritonStep
    else:
        kind = {"torch": TorchStep, "native": NativeStep}[kernels]
    return kind(parameters, moments, since_fired, plan, adam, **settings)


def backend() -> Backend:
    """Return the current back end of the differentiable functions."""
    return BACKENDS[_current]


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    precision: Precision | None = None,
    *,
    rectify: bool = True,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k strongest latents of each vector; see `Backend.encode_topk`."""
    return backend().encode_topk(x, W_enc, b_enc, b_dec, k, precision, rectify=rectify)


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """Return the reconstruction of a code; see `Backend.decode_topk`."""
    return backend().decode_topk(values, indices, W_dec, b_dec)
