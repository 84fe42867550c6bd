"""The type checker that jaxtyping's import hook puts around every function while tests run."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

_check = beartype(
    conf=BeartypeConf(
        # jaxtyping decorates methods one by one, where beartype cannot know what Self is.
        hint_overrides=FrozenDict({Self: Any}),
        is_pep484_tower=True,
    )
)
_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Check the functions of every module of Sparsight that is imported from now on."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("sparsight", "shape_checks.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result, unless it takes activations.

    Tests stand tensors in memory in for stores, with the methods that are called and no others.
    """
    hints = getattr(function, "__annotations__", {}).values()
    if any("Activation" in str(hint) for hint in hints):
        return function
    checked: Callable[..., Any] = _check(function)
    return checked


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """In the place of jaxtyping's decorator, which takes half of the tests' time.

    That one checks all arguments twice, and binds them even where there are no shapes to compare.
    """
    as_usual = _jaxtyped(typechecker=typechecker)

    def decorate(decorated: Any) -> Any:
        if not inspect.isfunction(decorated) or inspect.isgeneratorfunction(decorated):
            return as_usual(decorated)
        return _checked_once(decorated)

    return decorate


def _checked_once(function: types.FunctionType) -> Callable[..., Any]:
    hints = {name: _resolved(hint, function) for name, hint in function.__annotations__.items()}
    checked = check(_with_hints(function, hints))
    if any(_has_shape(hint) for hint in hints.values()):
        checked = _jaxtyped(typechecker=None)(checked)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        return checked(*args, **kwargs)

    return either


def _with_hints(function: types.FunctionType, hints: dict[str, Any]) -> types.FunctionType:
    """The same function; beartype itself does not look up names as jaxtyping does."""
    same = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(same, function)
    del same.__wrapped__
    same.__kwdefaults__ = function.__kwdefaults__
    same.__annotations__ = hints
    return same


def _resolved(hint: Any, function: types.FunctionType) -> Any:
    """What a hint says, or Any where a name in it is known to type checkers alone."""
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        return typing.get_type_hints(holder, function.__globals__, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, list):  # arguments of a Callable
        return any(_has_shape(each) for each in hint)
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(each) for each in typing.get_args(hint))
