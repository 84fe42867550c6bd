"""Whole numbers on the command line, as people write them: 1000000, 1_000_000, 1e6, 1M."""

from __future__ import annotations

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sparsight.config import whole_number

REGISTRY = ConstructorRegistry()
"""For `tyro.cli`."""


@REGISTRY.primitive_rule
def whole_number_rule(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Read every option that is an integer."""
    if type_info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda arguments: whole_number(arguments[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )
