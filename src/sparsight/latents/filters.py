"""Filters of a table of latents, such as `density < .01 and moran > .3`.

A comparison with a missing value does not hold; a column alone holds where it has a value (or, if
its values are true and false, where it is true).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from sparsight.errors import UserError
from sparsight.latents.expressions import (
    And,
    Condition,
    Not,
    Or,
    Text,
    Token,
    Tree,
    close_to,
    parse,
)
from sparsight.text import shortened

_COMPARE = {
    "==": pc.equal,
    "!=": pc.not_equal,
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
}


def filtered(table: pa.Table, condition: str) -> pa.Table:
    """Return the rows of a table for which a condition holds.

    Args:
        table: a table of numbers, texts and truth values; other columns cannot be compared.
        condition: comparisons of columns with numbers, texts in quotes or other columns, joined by
            and, or, not and parentheses.

    Raises:
        UserError: a typo, or an unknown column; the message has its place.
    """
    return table.filter(pa.array(holds(table, condition)))


def holds(table: pa.Table, condition: str) -> Bool[np.ndarray, " rows"]:
    """Return for which rows of a table a condition holds; see `filtered`."""
    reader = _Reader(Text(condition, "Filter"), table)
    return reader.mask(parse(reader.text, "a column, `not` or `(`"))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


class _Reader:
    """What the words of a filter mean in a table."""

    def __init__(self, text: Text, table: pa.Table) -> None:
        self.text = text
        self.table = table

    def mask(self, tree: Tree) -> Bool[np.ndarray, " rows"]:
        match tree:
            case Not(term):
                return ~self.mask(term)
            case And(terms):
                all_hold: Bool[np.ndarray, " rows"] = np.all(
                    [self.mask(term) for term in terms], axis=0
                )
                return all_hold
            case Or(terms):
                any_hold: Bool[np.ndarray, " rows"] = np.any(
                    [self.mask(term) for term in terms], axis=0
                )
                return any_hold
            case Condition():
                found = pc.fill_null(self.condition(tree), False)
                mask: Bool[np.ndarray, " rows"] = np.asarray(found.to_numpy(), dtype=bool)
                return mask

    def condition(self, condition: Condition) -> Any:
        column = self.column(condition.subject)
        if condition.comparison is None:
            return column if pa.types.is_boolean(column.type) else column.is_valid()
        values = [self.value(column, condition, token) for token in condition.values]
        if condition.comparison == "in":
            masks = [pc.fill_null(pc.equal(column, value), False) for value in values]
            together = masks[0]
            for mask in masks[1:]:
                together = pc.or_(together, mask)
            return together
        return _COMPARE[condition.comparison](column, values[0])

    def column(self, token: Token) -> Any:
        if token.kind != "word":
            raise self.text.unexpected(token, "a column")
        if token.value not in self.table.column_names:
            names = self.table.column_names
            close = close_to(str(token.value), names)
            listed = ", ".join(names)
            raise self.text.wrong(
                token, f"no column {shortened(token.written)}.{close} Columns: {listed}."
            )
        column = self.table[str(token.value)]
        if _is_number(column.type):
            return column.cast(pa.float64())
        if pa.types.is_boolean(column.type) or pa.types.is_string(column.type):
            return column
        raise self.text.wrong(
            token, f"{token.value} holds one list per latent, which cannot be compared."
        )

    def value(self, column: Any, condition: Condition, token: Token) -> Any:
        name = condition.subject.value
        if pa.types.is_boolean(column.type):
            raise self._of_kind(token, f"{name} is true or false; write `{name}` or `not {name}`")
        value: Any = self.column(token) if token.kind == "word" else token.value
        is_text = pa.types.is_string(value.type) if token.kind == "word" else token.kind == "text"
        if is_text != pa.types.is_string(column.type):
            kind = "a text in quotes" if not is_text else "a number"
            raise self._of_kind(token, f"{name} cannot be compared with it; expected {kind}")
        if is_text and condition.comparison not in ("==", "!=", "in"):
            raise self._of_kind(token, f"compare the text {name} by `==`, `!=` or `in`")
        if token.kind == "number" and pa.types.is_float32(self.table[str(name)].type):
            return float(np.float32(token.value))  # so `q50 >= .1` holds for the value 0.1
        return value

    def _of_kind(self, token: Token, words: str) -> UserError:
        return self.text.wrong(token, f"{words}.")
