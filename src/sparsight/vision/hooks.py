"""Read and replace the activations of a module, with forward hooks that are always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import SparsightError, UserError

Touch = Callable[[Tensor], Tensor | None]
"""Takes `[batch, positions, d_in]`; returns its replacement, or None to keep it."""

Edit = Callable[[Tensor], Tensor]
"""Maps a site's `[batch, positions, d_in]` to a tensor of the same shape."""


class StopForward(Exception):
    """Ends a forward pass early: everything asked for has been read."""


@dataclass(frozen=True)
class Place:
    """Where a site is: the input or the output of a module."""

    module: nn.Module
    side: Literal["input", "output"] = "output"


@contextmanager
def touching(place: Place, touch: Touch) -> Iterator[None]:
    """Call `touch` on the activations at `place` in every forward pass inside the block.

    Hooks run in the order in which they were registered, so a reading hook after an editing one
    sees the edited value. Modules that return a tuple (encoder layers before transformers 5,
    attention everywhere) and modules that return a tensor are treated alike; outputs
    `[batch, d_in]` are passed as `[batch, 1, d_in]`.
    """
    if place.side == "input":
        handle = place.module.register_forward_pre_hook(_on_input(touch), with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(_on_output(touch))
    try:
        yield
    finally:
        handle.remove()


def checked(site: str, edit: Edit) -> Touch:
    """Wrap an edit so that its output is checked against its input."""

    def touch(x: Float[Tensor, "batch positions d_in"]) -> Tensor:
        y = edit(x)
        if not isinstance(y, Tensor):
            raise UserError(f"The edit at {site} returned {type(y).__name__}, expected a tensor.")
        if y.shape != x.shape:
            raise UserError(
                f"The edit at {site} returned shape {list(y.shape)}, expected the shape of its "
                f"input: {list(x.shape)} (batch, positions, d_in)."
            )
        if y.device != x.device:
            raise UserError(
                f"The edit at {site} returned a tensor on {y.device}; the model is on {x.device}."
            )
        return y.to(x.dtype)

    return touch


def first_tensor(value: Any) -> Tensor:
    """Return the activations in a module's output: the tensor itself, or a tuple's first entry."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    raise SparsightError(
        f"A module returned {type(value).__name__}, expected a tensor or a tuple that starts "
        "with one."
    )


def _replace(value: Any, tensor: Tensor) -> Any:
    if isinstance(value, Tensor):
        return tensor
    return type(value)((tensor, *value[1:]))


def _apply(touch: Touch, x: Tensor) -> Tensor | None:
    if x.ndim != 2:
        return touch(x)
    y = touch(x.unsqueeze(1))
    return None if y is None else y.squeeze(1)


def _on_output(touch: Touch) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        y = _apply(touch, first_tensor(output))
        return None if y is None else _replace(output, y)

    return hook


def _on_input(touch: Touch) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            y = _apply(touch, args[0])
            return None if y is None else ((y, *args[1:]), kwargs)
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        y = _apply(touch, kwargs[name])
        return None if y is None else (args, {**kwargs, name: y})

    return hook
