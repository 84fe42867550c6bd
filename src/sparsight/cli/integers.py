"""Whole numbers on the command line, as people write them: 1000000, 1_000_000, 1e6, 1M."""

from __future__ import annotations

import typing

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sparsight.config import whole_number

REGISTRY = ConstructorRegistry()
"""The rules to pass to `tyro.cli`."""


@REGISTRY.primitive_rule
def whole_number_rule(
    type_info: PrimitiveTypeInfo,
) -> PrimitiveConstructorSpec[int | None] | None:
    """Make tyro read whole numbers for every option of type int, or int or None."""
    optional = set(typing.get_args(type_info.type)) == {int, type(None)}
    if type_info.type is not int and not optional:
        return None

    def read(arguments: list[str]) -> int | None:
        if optional and arguments[0] == "None":
            return None
        return whole_number(arguments[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|INT" if optional else "INT",
        instance_from_str=read,
        is_instance=lambda value: type(value) is int or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )
