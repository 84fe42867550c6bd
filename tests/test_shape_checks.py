"""Tests notice a wrong shape or type anywhere in the code that they run."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import shape_checks
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.training.schedule import learning_rate_factor


@pytest.fixture
def sae() -> SparseAutoencoder:
    return SparseAutoencoder(4, SAEConfig(8, sparsity=TopK(2)))


def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    return a @ b if len(a) == 2 else (a @ b)[1:]


def half(n: int) -> int:
    return n // 2 if n % 2 == 0 else n / 2  # type: ignore[return-value]


def checked(function):
    return shape_checks.jaxtyped(typechecker=shape_checks.check)(function)


def test_functions_of_the_package_are_checked(sae: SparseAutoencoder) -> None:
    with pytest.raises(Exception, match="violates type hint"):
        sae.decode(torch.zeros(3, 4))
    with pytest.raises(Exception, match="violates type hint"):
        learning_rate_factor("3", 10, 0, 0)


def test_shapes_are_compared_between_arguments_and_with_the_result() -> None:
    multiply = checked(product)
    assert multiply(torch.ones(2, 3), torch.ones(3, 5)).shape == (2, 5)
    with pytest.raises(Exception, match="violates type hint"):
        multiply(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(Exception, match=r"(?s)return .* violates type hint"):
        multiply(torch.ones(3, 3), torch.ones(3, 5))
    assert multiply(torch.ones(2, 7), torch.ones(7, 5)).shape == (2, 5)  # sizes are forgotten


def test_types_of_arguments_and_result_are_checked() -> None:
    halve = checked(half)
    assert halve(6) == 3
    for wrong in ("6", 7):
        with pytest.raises(Exception, match="violates type hint"):
            halve(wrong)


@pytest.mark.unchecked
def test_nothing_is_checked_where_a_test_says_so() -> None:
    assert checked(half)(7) == 3.5
