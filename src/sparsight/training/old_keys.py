"""Keys of the previous version, which this version still reads: the remedies for dead latents.

Until 0.1 `TrainConfig` had one optional field per remedy: `auxk`, `ghost` and `resampling`. Now it
has one `remedy`, tagged by its kind.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sparsight.config import NONE, kind_of
from sparsight.errors import UserError
from sparsight.sae.remedies import AnyRemedy, AuxK, GhostGradients, Resampling

REMEDY = "remedy"
_PACKAGE = str(Path(__file__).parents[1])

OLD_REMEDIES: dict[str, type[AnyRemedy]] = {
    "auxk": AuxK,
    "ghost": GhostGradients,
    "resampling": Resampling,
}
"""The former field of each remedy."""


def with_remedy(
    values: Mapping[str, Any], where: str = "", path: str = "", *, quiet: bool = False
) -> dict[str, Any]:
    """Return training settings with `remedy` in place of the former keys.

    Args:
        values: the settings, as in a table.
        where: what messages name first, e.g. the file.
        path: the prefix of the keys in messages, e.g. "train.".
        quiet: do not warn.

    Raises:
        UserError: two remedies are named, or an old key together with `remedy`.
    """
    old = {key: values[key] for key in OLD_REMEDIES if key in values}
    if not old:
        return dict(values)
    place = f"{where}: " if where else ""
    if REMEDY in values:
        raise UserError(
            f"{place}{path}{next(iter(old))} is the old name of {path}{REMEDY}; give only one."
        )
    named = [key for key, value in old.items() if not _is_none(value)]
    if len(named) > 1:
        raise UserError(
            f"{place}{' and '.join(path + key for key in named)} are two remedies for dead latents,"
            f" but training uses one; keep one of them, as {path}{REMEDY}. A run that earlier "
            "versions began with both needs Sparsight 0.1 to continue."
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
    """Return keywords of `TrainConfig` with `remedy` in place of the former ones.

    Args:
        keywords: as a program gives them; `dataclasses.replace` also gives every field.
        current: the remedy if none is named.

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
    else:  # a remedy was switched off
        of_current = next((k for k, kind in OLD_REMEDIES.items() if type(current) is kind), None)
        found[REMEDY] = None if of_current in old else current
    _warn("", "", old, found[REMEDY])
    return found


def pairs_with_remedy(grid: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the keys and values of a sweep's grid, with `remedy` in place of the former keys.

    Raises:
        UserError: two remedies vary, or one together with `remedy`.
    """
    first = [key.partition(".")[0] for key, _ in grid]
    old = sorted(set(OLD_REMEDIES) & set(first))
    if not old:
        return list(grid)
    if len(old) > 1 or REMEDY in first:
        names = [*old, *([REMEDY] if REMEDY in first else [])]
        raise UserError(
            f"grid: {' and '.join(names)} cannot vary together: an autoencoder has at most one "
            f"remedy for dead latents. List the remedies as {REMEDY}."
        )
    _warn_caller(
        f"grid: {old[0]} is now called {REMEDY}; the next version drops the old key.",
    )
    found = []
    for key, value in grid:
        if key == old[0] and isinstance(value, list | tuple):
            value = [_tagged(key, each) for each in value]
        of_old = key.partition(".")[0] == old[0]
        found.append((REMEDY + key.removeprefix(old[0]) if of_old else key, value))
    return found


def remedies_in(train: Mapping[str, Any]) -> list[type[AnyRemedy]]:
    """Return the remedies in a stored training table; earlier versions could have several."""
    kinds = {kind_of(kind): kind for kind in get_args(AnyRemedy)}
    named = train.get(REMEDY)
    if isinstance(named, Mapping) and named.get("kind") in kinds:
        return [kinds[named["kind"]]]
    return [kind for key, kind in OLD_REMEDIES.items() if isinstance(train.get(key), Mapping)]


def _is_none(value: Any) -> bool:
    return value is None or value == NONE


def _tagged(key: str, value: Any) -> Any:
    """Return a remedy with its kind, from the value of its former key."""
    if isinstance(value, Mapping) and "kind" not in value:
        return {"kind": kind_of(OLD_REMEDIES[key]), **value}
    return value


def remedy_of_old_name(remedy: AnyRemedy | None, name: str) -> AnyRemedy | None:
    """Return what the former field `name` of `TrainConfig` held, and warn that it is gone."""
    _warn_caller(
        f"TrainConfig.{name} is now TrainConfig.{REMEDY}; the next version drops the old name.",
    )
    return remedy if type(remedy) is OLD_REMEDIES[name] else None


def _warn_caller(message: str) -> None:
    """Warn, and name the nearest line outside Sparsight as the place."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, "<")):
        frame = frame.f_back
    warnings.warn_explicit(
        message, FutureWarning, frame.f_code.co_filename, frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )  # fmt: skip


def _warn(place: str, path: str, old: Mapping[str, Any], remedy: Any) -> None:
    shown = repr(remedy)
    if remedy == NONE:
        shown = f'"{NONE}"'
    elif isinstance(remedy, Mapping):
        shown = "{" + ", ".join(f"{key} = {value!r}" for key, value in remedy.items()) + "}"
    beside = ""
    if "auxk" not in old and not _is_none(remedy):
        beside = " Training uses one remedy, so AuxK, formerly on by default, is now off."
    _warn_caller(
        f"{place}{', '.join(path + key for key in old)}: now write {path}{REMEDY} = {shown}; the "
        f"next version drops the old key.{beside}",
    )
