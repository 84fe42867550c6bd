"""Keys of earlier versions, which are read for one version: the remedies for dead latents.

Until 0.1 `TrainConfig` had one optional field per remedy: `auxk`, `ghost` and `resampling`. Now it
has one `remedy`, tagged by its kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from sparsight.config import NONE, kind_of
from sparsight.errors import UserError
from sparsight.sae.remedies import AnyRemedy, AuxK, GhostGradients, Resampling

REMEDY = "remedy"

OLD_REMEDIES: dict[str, type[AnyRemedy]] = {
    "auxk": AuxK,
    "ghost": GhostGradients,
    "resampling": Resampling,
}
"""The field that each remedy had."""


def with_remedy(
    values: Mapping[str, Any], where: str = "", path: str = "", *, quiet: bool = False
) -> dict[str, Any]:
    """Settings of training with `remedy` in place of the keys that there were before.

    Args:
        values: as a table has them.
        where: what messages name first, e.g. the file.
        path: what stands before the keys in messages, e.g. "train.".
        quiet: no warning.

    Raises:
        UserError: two remedies are named, or an old key beside `remedy`.
    """
    old = {key: values[key] for key in OLD_REMEDIES if key in values}
    if not old:
        return dict(values)
    place = f"{where}: " if where else ""
    if REMEDY in values:
        raise UserError(
            f"{place}{path}{next(iter(old))} and {path}{REMEDY} are the same; give one of them."
        )
    named = [key for key, value in old.items() if not _is_none(value)]
    if len(named) > 1:
        raise UserError(
            f"{place}{' and '.join(path + key for key in named)} are two remedies for dead latents;"
            f" training takes one: keep one, as {path}{REMEDY}."
        )
    found = {key: value for key, value in values.items() if key not in OLD_REMEDIES}
    if named:
        found[REMEDY] = _tagged(named[0], old[named[0]])
    elif "auxk" in old:
        found[REMEDY] = NONE
    if not quiet:
        _warn(place, path, old, found.get(REMEDY))
    return found


def with_remedy_of(keywords: Mapping[str, Any], current: AnyRemedy | None) -> dict[str, Any]:
    """Keywords of `TrainConfig` with `remedy` in place of those that there were before.

    Args:
        keywords: as a program gives them; `dataclasses.replace` gives every field beside them.
        current: the remedy where none is named.

    Raises:
        UserError: two remedies are named.
    """
    old = {key: keywords[key] for key in OLD_REMEDIES if key in keywords}
    if not old:
        return dict(keywords)
    found = {key: value for key, value in keywords.items() if key not in OLD_REMEDIES}
    current = found.get(REMEDY, current)
    named = with_remedy(old, quiet=True).get(REMEDY)
    if named not in (None, NONE):
        found[REMEDY] = named
    else:  # what was switched off
        of_current = next((k for k, kind in OLD_REMEDIES.items() if type(current) is kind), None)
        found[REMEDY] = None if of_current in old else current
    _warn("", "", old, found[REMEDY])
    return found


def pairs_with_remedy(grid: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The keys and values of a sweep's grid, with `remedy` in place of the keys there were before.

    Raises:
        UserError: two remedies vary, or one beside `remedy`.
    """
    first = [key.partition(".")[0] for key, _ in grid]
    old = sorted(set(OLD_REMEDIES) & set(first))
    if not old:
        return list(grid)
    if len(old) > 1 or REMEDY in first:
        names = [*old, *([REMEDY] if REMEDY in first else [])]
        raise UserError(
            f"grid: {' and '.join(names)} cannot vary together: a member has one remedy for dead "
            f"latents at most. List the remedies as {REMEDY}."
        )
    warnings.warn(
        f"grid: {old[0]} is now called {REMEDY}; the old key is read for one version.",
        FutureWarning,
        stacklevel=3,
    )
    found = []
    for key, value in grid:
        if key == old[0] and isinstance(value, list | tuple):
            value = [_tagged(key, each) for each in value]
        of_old = key.partition(".")[0] == old[0]
        found.append((REMEDY + key.removeprefix(old[0]) if of_old else key, value))
    return found


def remedies_in(train: Mapping[str, Any]) -> list[type[AnyRemedy]]:
    """The remedies that a stored table of training names; earlier versions had several at once."""
    kinds = {kind_of(kind): kind for kind in get_args(AnyRemedy)}
    named = train.get(REMEDY)
    if isinstance(named, Mapping) and named.get("kind") in kinds:
        return [kinds[named["kind"]]]
    return [kind for key, kind in OLD_REMEDIES.items() if isinstance(train.get(key), Mapping)]


def _is_none(value: Any) -> bool:
    return value is None or value == NONE


def _tagged(key: str, value: Any) -> Any:
    """A remedy with its kind, from the value of the key that it had."""
    if isinstance(value, Mapping) and "kind" not in value:
        return {"kind": kind_of(OLD_REMEDIES[key]), **value}
    return value


def _warn(place: str, path: str, old: Mapping[str, Any], remedy: Any) -> None:
    shown = repr(remedy)
    if remedy == NONE:
        shown = f'"{NONE}"'
    elif isinstance(remedy, Mapping):
        shown = "{" + ", ".join(f"{key} = {value!r}" for key, value in remedy.items()) + "}"
    beside = ""
    if "auxk" not in old and not _is_none(remedy):
        beside = " Training has one remedy: AuxK, which was on beside it by default, is off."
    warnings.warn(
        f"{place}{', '.join(path + key for key in old)}: now write {path}{REMEDY} = {shown}; the "
        f"old key is read for one version.{beside}",
        FutureWarning,
        stacklevel=3,
    )
