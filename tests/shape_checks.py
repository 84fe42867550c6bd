"""The type checker that jaxtyping's import hook puts around every function while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

_check = beartype(
    conf=BeartypeConf(
        # jaxtyping decorates methods one by one, where beartype cannot know what Self is.
        hint_overrides=FrozenDict({Self: Any}),
        is_pep484_tower=True,
    )
)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result, unless it takes activations.

    Tests stand tensors in memory in for stores, with the methods that are called and no others.
    """
    hints = getattr(function, "__annotations__", {}).values()
    if any("Activation" in str(hint) for hint in hints):
        return function
    checked: Callable[..., Any] = _check(function)
    return checked
